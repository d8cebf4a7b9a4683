//! Where the store is, and how it is opened.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use baton_membership::config::without_password;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions as _, SqlSafeStr as _};
use tokio::sync::OnceCell;

use super::{Pool, Store, StoreError};

/// How long to wait for a connection.
const ACQUIRE: Duration = Duration::from_secs(3);
/// Connections of one gateway. SQLite writes one at a time; more are for readers.
const SQLITE_CONNECTIONS: u32 = 4;
const POSTGRES_CONNECTIONS: u32 = 16;
/// How often the tables are tried to be made: gateways that start together are in each other's way
/// on SQLite, which has no lock for it.
const MIGRATE_TRIES: u32 = 5;

/// Where responses are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    None,
    /// In a file of SQLite; `None` is [`default_file`].
    Sqlite(Option<PathBuf>),
    /// In a database of PostgreSQL: its URL.
    Postgres(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "sqlite" => Ok(Self::Sqlite(None)),
            Some(("sqlite", path)) if !path.trim_start_matches('/').is_empty() => {
                let path = path.strip_prefix("//").unwrap_or(path);
                Ok(Self::Sqlite(Some(path.into())))
            }
            Some(("postgres" | "postgresql", rest)) if rest.starts_with("//") => {
                PgConnectOptions::from_str(text).map_err(|error| error.to_string())?;
                Ok(Self::Postgres(text.to_owned()))
            }
            _ => Err("must be none, sqlite, sqlite:PATH or postgres://USER@HOST/DATABASE".into()),
        }
    }
}

impl Place {
    /// As it may be shown: without a password.
    pub fn shown(&self) -> String {
        match self {
            Self::None => "none".into(),
            Self::Sqlite(None) => "sqlite".into(),
            Self::Sqlite(Some(path)) => format!("sqlite:{}", path.display()),
            // A password may also be among the parameters.
            Self::Postgres(url) => {
                without_password(url).split('?').next().unwrap_or_default().into()
            }
        }
    }
}

/// `$XDG_DATA_HOME/baton/responses.db`, or `~/.local/share/baton/responses.db`.
fn default_file() -> Result<PathBuf, String> {
    let absolute = |variable| {
        std::env::var_os(variable).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute())
    };
    let data = absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .ok_or("there is no home folder: give --responses-store sqlite:PATH, or none")?;
    Ok(data.join("baton/responses.db"))
}

impl Store {
    /// Opens the store. A file that cannot be had is an error; a database that does not answer is
    /// tried again when it is needed.
    pub async fn open(place: &Place, ttl: u64) -> Result<Option<Self>, String> {
        let (pool, shown) = match place {
            Place::None => return Ok(None),
            Place::Sqlite(path) => {
                let path = path.clone().map_or_else(default_file, Ok)?;
                create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                let options = SqliteConnectOptions::new()
                    .filename(&path)
                    .journal_mode(SqliteJournalMode::Wal)
                    .synchronous(SqliteSynchronous::Normal)
                    .busy_timeout(ACQUIRE)
                    .foreign_keys(true)
                    .disable_statement_logging();
                let pool = SqlitePoolOptions::new()
                    .max_connections(SQLITE_CONNECTIONS)
                    .acquire_timeout(ACQUIRE)
                    .connect_lazy_with(options);
                (Pool::Sqlite(pool), format!("sqlite:{}", path.display()))
            }
            Place::Postgres(url) => {
                let options = PgConnectOptions::from_str(url)
                    .map_err(|error| error.to_string())?
                    .disable_statement_logging();
                let pool = PgPoolOptions::new()
                    .max_connections(POSTGRES_CONNECTIONS)
                    .acquire_timeout(ACQUIRE)
                    .connect_lazy_with(options);
                (Pool::Postgres(pool), place.shown())
            }
        };
        let store = Self { pool, shown, ttl, ready: OnceCell::new() };
        match store.prepare().await {
            Err(error) if matches!(place, Place::Sqlite(_)) => {
                return Err(format!("{}: {error}", store.shown));
            }
            Err(error) => {
                tracing::warn!(store = store.shown, %error, "responses cannot be kept yet");
            }
            Ok(()) => {}
        }
        Ok(Some(store))
    }

    /// Makes the tables, once.
    pub(super) async fn prepare(&self) -> Result<(), StoreError> {
        if self.ready.initialized() {
            return Ok(());
        }
        self.ready.get_or_try_init(|| self.migrate()).await?;
        Ok(())
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        let migrator = Migrator::with_migrations(vec![Migration::new(
            1,
            "responses".into(),
            MigrationType::Simple,
            include_str!("../../migrations/0001_responses.sql").into_sql_str(),
            false,
        )]);
        let mut tries = 1;
        loop {
            let made = match &self.pool {
                Pool::Sqlite(pool) => migrator.run(pool).await,
                Pool::Postgres(pool) => migrator.run(pool).await,
            };
            match made {
                Ok(()) => return Ok(()),
                Err(_) if matches!(self.pool, Pool::Sqlite(_)) && tries < MIGRATE_TRIES => {
                    tokio::time::sleep(Duration::from_millis(100) * tries).await;
                    tries += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Makes the file, and its folder, for this user alone: it holds conversations.
fn create(path: &Path) -> std::io::Result<()> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_and_shown_without_its_password() {
        for (text, shown) in [
            ("none", "none"),
            ("sqlite", "sqlite"),
            ("sqlite:a/b.db", "sqlite:a/b.db"),
            ("sqlite:///var/b.db", "sqlite:/var/b.db"),
            ("postgres://u:hush@h/d?sslmode=require", "postgres://***@h/d"),
            ("postgresql://h:1/d?password=hush", "postgresql://h:1/d"),
        ] {
            assert_eq!(text.parse::<Place>().unwrap().shown(), shown, "{text}");
        }
        for bad in ["", "sqlite:", "sqlite://", "mysql://h/d", "postgres:x", "nowhere"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }
}
