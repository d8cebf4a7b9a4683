//! A package index of the test's own: files that a real nginx serves, over TLS and to those who
//! have the password.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::authority::Authority;
use crate::ports;
use crate::process::{Process, Spec};

/// A running index.
#[derive(Debug)]
pub struct PackageIndex {
    dir: PathBuf,
    port: u16,
    nginx: Process,
}

impl PackageIndex {
    /// Starts one without packages. It sends `rate` bytes a second to each connection, such as
    /// `20m`; `0` is as many as go.
    pub fn start(dir: &Path, rate: &str) -> Self {
        fs::create_dir_all(dir.join("root/files")).expect("a folder");
        Authority::new(dir.join("tls")).sign("index");
        fs::write(dir.join("users"), "some one:{PLAIN}pass@word\n").expect("write the users");
        let port = ports::free();
        let at = dir.to_str().expect("a path in UTF-8");
        let config = format!(
            "pid {at}/nginx.pid;\nerror_log {at}/error.log;\nevents {{}}\nhttp {{\n\
             access_log {at}/access.log;\nclient_body_temp_path {at}/body;\n\
             types {{ text/html html; application/octet-stream whl; }}\n\
             server {{\nlisten 127.0.0.1:{port} ssl;\nroot {at}/root;\n\
             ssl_certificate {at}/tls/index.pem;\nssl_certificate_key {at}/tls/index.key;\n\
             rewrite ^/moved/(.*)$ /simple/$1 redirect;\n\
             auth_basic index;\nauth_basic_user_file {at}/users;\nlimit_rate {rate};\n}}\n}}\n"
        );
        fs::write(dir.join("nginx.conf"), config).expect("write the configuration");
        Self { dir: dir.to_owned(), port, nginx: run(dir) }
    }

    /// Ends the server, and starts it again.
    pub fn restart(&mut self) {
        self.nginx.kill();
        self.nginx = run(&self.dir);
    }

    /// Adds a package: `files` are names in it and where they are now. Another version is in the
    /// list as well, which is not there.
    pub fn add(&self, name: &str, version: &str, files: &[(String, PathBuf)]) {
        let wheel = wheel(name, version);
        let file = File::create(self.dir.join("root/files").join(&wheel)).expect("create a wheel");
        let mut zip = ZipWriter::new(file);
        for (name, from) in files {
            zip.start_file(name, SimpleFileOptions::default()).expect("begin a file");
            let mut from = File::open(from).expect("open a file of the package");
            io::copy(&mut from, &mut zip).expect("write the wheel");
        }
        zip.finish().expect("write the wheel");
        let folder = self.dir.join("root/simple").join(name);
        fs::create_dir_all(&folder).expect("a folder");
        let other = wheel.replace(version, "9.9");
        let page = format!(
            "<!DOCTYPE html><body><a href=\"../../files/{other}\">{other}</a><br/>\n\
             <a href=\"../../files/{wheel}#sha256=0\" data-requires-python=\"&gt;=3\">{wheel}</a>"
        );
        fs::write(folder.join("index.html"), page).expect("write the list");
    }

    /// How large a package's wheel is.
    pub fn bytes(&self, name: &str, version: &str) -> u64 {
        let wheel = self.dir.join("root/files").join(wheel(name, version));
        fs::metadata(wheel).expect("a wheel").len()
    }

    /// Its address, as pip wants it, for who gives this password. From there one is led to where
    /// the lists are.
    pub fn url(&self, password: &str) -> String {
        self.at("moved", password)
    }

    /// The address of an index that has no package.
    pub fn empty(&self) -> String {
        self.at("empty", Self::PASSWORD)
    }

    fn at(&self, folder: &str, password: &str) -> String {
        format!("https://some%20one:{password}@127.0.0.1:{}/{folder}", self.port)
    }

    /// The password, as it is written in an address.
    pub const PASSWORD: &str = "pass%40word";

    /// The file of the authority that signed its certificate.
    pub fn authority(&self) -> PathBuf {
        self.dir.join("tls/ca.pem")
    }

    /// Requests for wheels that it has answered, or begun to: status and bytes of each.
    pub fn served(&self) -> Vec<(u16, u64)> {
        let log = fs::read_to_string(self.dir.join("access.log")).unwrap_or_default();
        let fields = |line: &str| {
            let (_, rest) = line.split_once(".whl HTTP/1.1\" ")?;
            let mut fields = rest.split(' ');
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        log.lines().filter_map(fields).collect()
    }
}

fn wheel(name: &str, version: &str) -> String {
    format!("{}-{version}-py3-none-any.whl", name.replace('-', "_"))
}

fn run(dir: &Path) -> Process {
    let config = dir.join("nginx.conf");
    // One process, which ends with the test.
    let alone = "daemon off; master_process off;".into();
    let args = ["-c".into(), config.into_os_string(), "-g".into(), alone];
    Process::start(&Spec::new("nginx", "nginx".into(), args), dir)
}
