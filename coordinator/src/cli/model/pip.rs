//! What is set up for pip, so that whoever has a mirror, a proxy or an authority of his own need not
//! say it again: variables, and the files of
//! <https://pip.pypa.io/en/stable/topics/configuration/>. Of its options those that a download needs:
//! `index-url`, `extra-index-url`, `proxy`, `cert` (or `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`) and
//! `trusted-host`.

use std::fs;
use std::path::{Path, PathBuf};

use configparser::ini::Ini;

/// Files for all users of a machine, the weakest first.
const GLOBAL: [&str; 2] = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf"];
const PYPI: &str = "https://pypi.org/simple";

/// The options in force.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pip {
    /// Addresses of package indexes, the first to ask first.
    pub(super) indexes: Vec<String>,
    /// By default the environment tells, as `HTTPS_PROXY` and `NO_PROXY`.
    pub(super) proxy: Option<String>,
    /// A file of the authorities to trust, instead of the system's.
    pub(super) cert: Option<PathBuf>,
    /// `HOST` or `HOST:PORT`, whose certificates are not checked.
    pub(super) trusted_hosts: Vec<String>,
}

impl Pip {
    /// Reads the environment and the files.
    ///
    /// # Errors
    /// A file that is no configuration, by its name.
    pub(super) fn read() -> Result<Self, String> {
        Self::gather(|name| std::env::var(name).ok(), &GLOBAL)
    }

    fn gather(variable: impl Fn(&str) -> Option<String>, global: &[&str]) -> Result<Self, String> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let mut files = Vec::new();
        for file in places(variable, global) {
            // One that may not be read, or is not there, is none for pip either.
            let Ok(text) = fs::read_to_string(&file) else { continue };
            let mut ini = Ini::new();
            ini.set_multiline(true);
            ini.set_inline_comment_symbols(Some(&[]));
            ini.read(text).map_err(|error| format!("{}: {error}", file.display()))?;
            files.push(ini);
        }
        let option = |name: &str| {
            let of_files = || {
                // A command's own section is stronger than the general one, in whichever file.
                let values = ["download", "global"].into_iter().flat_map(|section| {
                    files.iter().rev().map(move |ini| {
                        ini.get(section, name).or_else(|| ini.get(section, &name.replace('-', "_")))
                    })
                });
                values.flatten().next()
            };
            let name = format!("PIP_{}", name.replace('-', "_").to_uppercase());
            // The strongest counts, also where it is empty.
            variable(&name).or_else(of_files).filter(|value| !value.is_empty())
        };
        let several = |name: &str| {
            let value = option(name).unwrap_or_default();
            value.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let first = option("index-url").unwrap_or_else(|| PYPI.into());
        let indexes = std::iter::once(first).chain(several("extra-index-url")).collect();
        let cert = option("cert").or_else(|| variable("REQUESTS_CA_BUNDLE"));
        let cert = cert.or_else(|| variable("CURL_CA_BUNDLE")).map(|cert| {
            let home = || Some(Path::new(&variable("HOME")?).join(cert.strip_prefix("~/")?));
            home().unwrap_or_else(|| cert.clone().into())
        });
        Ok(Self { indexes, proxy: option("proxy"), cert, trusted_hosts: several("trusted-host") })
    }
}

/// Where files may lie, the weakest first.
fn places(variable: impl Fn(&str) -> Option<String>, global: &[&str]) -> Vec<PathBuf> {
    let chosen = variable("PIP_CONFIG_FILE").map(PathBuf::from);
    if chosen.as_deref() == Some(Path::new("/dev/null")) {
        return Vec::new();
    }
    let mut files: Vec<PathBuf> = global.iter().map(PathBuf::from).collect();
    let home = variable("HOME").map(PathBuf::from);
    // One that is chosen stands for the user's.
    if !chosen.as_ref().is_some_and(|file| file.exists()) {
        files.extend(home.as_ref().map(|home| home.join(".pip/pip.conf")));
        let config = variable("XDG_CONFIG_HOME").map(PathBuf::from);
        let config = config.or_else(|| Some(home?.join(".config")));
        files.extend(config.map(|folder| folder.join("pip/pip.conf")));
    }
    files.extend(variable("VIRTUAL_ENV").map(|folder| Path::new(&folder).join("pip.conf")));
    files.extend(chosen);
    files
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn gather(variables: &[(&str, &str)], global: &[&str]) -> Result<Pip, String> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        Pip::gather(|name| variables.get(name).map(|&value| value.to_owned()), global)
    }

    #[test]
    fn without_anything_set_up_pypi_is_asked() {
        let pip =
            Pip { indexes: vec![PYPI.into()], proxy: None, cert: None, trusted_hosts: Vec::new() };
        assert_eq!(gather(&[], &["/nowhere"]).unwrap(), pip);
        assert_eq!(gather(&[("PIP_INDEX_URL", "")], &[]).unwrap(), pip);
    }

    #[test]
    fn variables_are_stronger_than_files_and_files_have_the_order_of_pip() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let global = file(
            "global.conf",
            "[global]\nindex-url = https://everybody:s3cr%40et@mirror.test/simple/\n\
             cert = /everybody.pem\n; a remark\nproxy: http://proxy.test:3128\n\
             trusted-host = a.test\n    b.test:8443\n",
        );
        let home = dir.path().to_str().unwrap().to_owned();
        file(".config/pip/pip.conf", "[global]\ncert = /mine.pem\nproxy = http://mine.test\n");
        let pip = gather(&[("HOME", &home)], &[&global]).unwrap();
        assert_eq!(pip.indexes, ["https://everybody:s3cr%40et@mirror.test/simple/"]);
        assert_eq!(pip.cert, Some("/mine.pem".into()));
        assert_eq!(pip.proxy.as_deref(), Some("http://mine.test"));
        assert_eq!(pip.trusted_hosts, ["a.test", "b.test:8443"]);

        let chosen = file(
            "chosen.conf",
            "[download]\nindex_url = https://chosen.test\n[global]\nindex-url = https://weaker.test\n\
             extra-index-url =\n    https://second.test\n    https://third.test\n",
        );
        let set = [
            ("HOME", home.as_str()),
            ("PIP_CONFIG_FILE", chosen.as_str()),
            ("PIP_CERT", "/variable.pem"),
        ];
        let pip = gather(&set, &[&global]).unwrap();
        let indexes = ["https://chosen.test", "https://second.test", "https://third.test"];
        assert_eq!(pip.indexes, indexes);
        assert_eq!(pip.cert, Some("/variable.pem".into()));
        assert_eq!(pip.proxy.as_deref(), Some("http://proxy.test:3128"), "the user's is left out");

        let bundles = [("PIP_CERT", "~/own.pem"), ("REQUESTS_CA_BUNDLE", "/bundle.pem")];
        let user = ("HOME", home.as_str());
        let cert = |set: &[(&str, &str)]| gather(set, &[]).unwrap().cert.unwrap();
        assert_eq!(cert(&[user, bundles[0], bundles[1]]), dir.path().join("own.pem"));
        assert_eq!(
            cert(&[("CURL_CA_BUNDLE", "/weaker.pem"), bundles[1]]),
            Path::new("/bundle.pem")
        );

        let empty = file("empty.conf", "[global]\nindex-url =\ntrusted-host\n");
        let empty = gather(&[("PIP_CONFIG_FILE", &empty)], &[&global]).unwrap();
        assert_eq!((empty.indexes, empty.trusted_hosts.len()), (vec![PYPI.to_owned()], 2));

        let none = [("HOME", home.as_str()), ("PIP_CONFIG_FILE", "/dev/null")];
        assert_eq!(gather(&none, &[&global]).unwrap().indexes, [PYPI]);

        let broken = file("broken.conf", "[global\nindex-url = x\n");
        let error = gather(&[], &[&broken]).unwrap_err();
        assert!(error.contains("broken.conf"), "{error}");
    }
}
