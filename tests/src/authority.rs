//! Certificates that openssl makes, in a folder.

use std::path::PathBuf;
use std::process::Command;

/// What new keys are.
const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];

/// One who signs: `ca.pem`, `ca.key`.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
}

impl Authority {
    /// A new one.
    pub fn new(folder: PathBuf) -> Self {
        std::fs::create_dir_all(&folder).expect("a folder");
        let new = Self { folder };
        let files = ["-keyout", "ca.key", "-out", "ca.pem", "-days", "2"];
        // By their names they are told apart, before any signature is looked at.
        let name =
            format!("/CN=authority {}", new.folder.file_name().unwrap_or_default().display());
        let own = ["req", "-x509", "-subj", &name];
        new.openssl(&[&own[..], &KEY, &files].concat());
        new
    }

    /// A certificate for 127.0.0.1 and its key: `NAME.pem`, `NAME.key`.
    pub fn sign(&self, name: &str) {
        self.sign_for(name, "IP:127.0.0.1");
    }

    /// The same for another address or name, such as `DNS:baton`.
    pub fn sign_for(&self, name: &str, names: &str) {
        let request = self.request(name, names);
        let ca = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"];
        let files = ["-in", &request, "-out", &format!("{name}.pem"), "-extfile", "extensions"];
        self.openssl(&[&["x509", "-req"], &ca[..], &files].concat());
    }

    /// The same; but the certificate was good years ago.
    pub fn sign_late(&self, name: &str, names: &str) {
        let request = self.request(name, names);
        let config = "[ca]\ndefault_ca=own\n[own]\ndatabase=index\nnew_certs_dir=.\nserial=serial\npolicy=any\n\
                      [any]\ncommonName=supplied\n";
        std::fs::write(self.folder.join("config"), config).expect("write");
        std::fs::write(self.folder.join("index"), "").expect("write");
        std::fs::write(self.folder.join("serial"), "01").expect("write");
        let ca = ["-config", "config", "-cert", "ca.pem", "-keyfile", "ca.key"];
        let dates = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"];
        let files = ["-in", &request, "-out", &format!("{name}.pem"), "-extfile", "extensions"];
        let how = ["ca", "-batch", "-notext", "-md", "sha256"];
        self.openssl(&[&how[..], &ca, &dates, &files].concat());
    }

    /// A key, and what is to be signed for it.
    fn request(&self, name: &str, names: &str) -> String {
        let extensions = format!("subjectAltName={names}\nbasicConstraints=CA:FALSE\n");
        std::fs::write(self.folder.join("extensions"), extensions).expect("write");
        let (key, request) = (format!("{name}.key"), format!("{name}.csr"));
        let subject = format!("/CN={name}");
        let files = ["-keyout", &key, "-out", &request, "-subj", &subject];
        self.openssl(&[&["req"], &KEY[..], &files].concat());
        request
    }

    fn openssl(&self, args: &[&str]) {
        let output = Command::new("openssl").args(args).current_dir(&self.folder).output();
        let output = output.expect("openssl runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {args:?}: {error}");
    }

    /// The path of a file.
    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().expect("a path in UTF-8").to_owned()
    }
}
