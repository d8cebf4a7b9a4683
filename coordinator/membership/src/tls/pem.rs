//! Certificates and keys in PEM files, and files that change. Errors name the flag and the file.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{info, warn};

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The certificates of a file, one at least.
pub fn certificates(flag: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let all = read.map_err(|error| at(flag, file, format!("cannot be read: {error}")))?;
    match all.is_empty() {
        true => Err(at(flag, file, "holds no certificate in PEM")),
        false => Ok(all),
    }
}

/// The certificates of a file, as those of authorities.
pub fn roots(flag: &str, file: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(flag, file)? {
        let added = roots.add(certificate);
        added.map_err(|error| at(flag, file, format!("cannot be used: {error}")))?;
    }
    Ok(roots)
}

/// The private key of a file.
pub fn private_key(flag: &str, file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(file)
        .map_err(|error| at(flag, file, format!("holds no private key: {error}")))
}

/// An error about a file.
pub fn at(flag: &str, file: &Path, problem: impl fmt::Display) -> String {
    format!("{flag} {} {problem}", file.display())
}

/// Reads files again whenever they have changed, until there is nothing to `look` at. What `read`
/// cannot use leaves the last good ones in use. `flags` is what the log calls them.
pub async fn follow<T, S: PartialEq>(
    flags: &str,
    mut seen: S,
    look: impl Fn() -> Option<(T, S)>,
    read: impl Fn(&T) -> Result<(), String>,
) {
    let mut told = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some((reader, now)) = look() else { return };
        if now == seen {
            continue;
        }
        match read(&reader) {
            Ok(()) => {
                info!(flags, "certificates have changed, and are used from now on");
                (seen, told) = (now, None);
            }
            // Perhaps one file is new and the other not yet: looked at again until it is well.
            Err(error) if told.as_ref() != Some(&error) => {
                warn!(error, "certificates have changed, but cannot be used; the old ones stay");
                told = Some(error);
            }
            Err(_) => {}
        }
    }
}
