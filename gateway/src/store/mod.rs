//! Responses that are kept: in a SQLite file, or in a PostgreSQL database that gateways share.
//!
//! A row is a response; [`Store::finish`] is the only way out of the states `queued` and
//! `in_progress`, and succeeds once, whoever tries: the gateway that generates, one that cancels,
//! one that finds the owner dead. The owner notices by [`Store::alive`] that a row was ended, or
//! deleted, by somebody else.
//!
//! Both databases get the same SQL. Every operation has a deadline.

mod open;

use std::fmt;
use std::time::Duration;

use sqlx::migrate::MigrateError;
use sqlx::{PgPool, QueryBuilder, SqlitePool};
use tokio::sync::OnceCell;

pub use open::Place;

use crate::api::envelope::unix_seconds;
use crate::error::ApiError;

/// The longest that one operation may take, connecting included.
const WITHIN: Duration = Duration::from_secs(5);
/// The most responses of a conversation that is rebuilt.
pub const MAX_TURNS: usize = 1000;
/// The most bytes of JSON of a conversation that is rebuilt.
pub const MAX_CONVERSATION: usize = 64 * 1024 * 1024;

/// Why the store did not do what it was asked.
#[derive(Clone, Debug)]
pub struct StoreError(String);

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StoreError {}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<MigrateError> for StoreError {
    fn from(error: MigrateError) -> Self {
        Self(format!("the tables cannot be set up: {error}"))
    }
}

/// The store.
pub struct Store {
    pool: Pool,
    /// The setting, as it may be shown.
    shown: String,
    /// Seconds that a response is kept.
    ttl: u64,
    /// Whether the tables are there.
    ready: OnceCell<()>,
}

enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// A response that is to be kept.
#[derive(Clone, Debug)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// Unix time in seconds.
    pub created: u64,
    /// Its status.
    pub status: &'static str,
    /// The gateway that generates it in the background; `None` for one that has ended.
    pub owner: Option<String>,
    /// Whether its events are kept.
    pub streamed: bool,
    /// Whose it is.
    pub key: String,
    /// The response that it continues.
    pub previous: Option<String>,
    /// The response object.
    pub body: String,
    /// The list of input items.
    pub input: String,
}

/// A response that was kept.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its status.
    pub status: String,
    /// Whether it is, or was, generated in the background.
    pub background: bool,
    /// Whether its events are kept.
    pub streamed: bool,
    /// The response object.
    pub body: String,
    /// The list of input items.
    pub input: String,
}

/// A turn of a conversation.
#[derive(Clone, Debug)]
pub struct Turn {
    /// The response's id.
    pub id: String,
    /// The one before.
    pub previous: Option<String>,
    /// Its status.
    pub status: String,
    /// The response object.
    pub body: String,
    /// The list of input items.
    pub input: String,
}

/// An event, by its sequence number.
pub type Event = (i64, String);

/// Runs a query on whichever pool there is.
macro_rules! on {
    ($store:expr, $pool:ident => $query:expr) => {{
        $store.prepare().await?;
        match &$store.pool {
            Pool::Sqlite($pool) => within($query).await,
            Pool::Postgres($pool) => within($query).await,
        }
    }};
}

/// The same for a statement: how many rows it changed.
macro_rules! execute {
    ($store:expr, $sql:expr $(, $value:expr)*) => {
        on!($store, pool => async {
            let query = sqlx::query($sql)$(.bind($value))*;
            Ok(query.execute(pool).await?.rows_affected())
        })
    };
}

async fn within<T>(work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(WITHIN, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(StoreError(format!("no answer within {} s", WITHIN.as_secs()))),
    }
}

impl Store {
    /// The setting, without a password.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// What a client is told when the store fails.
    pub fn unavailable(&self, error: &StoreError) -> ApiError {
        ApiError::unavailable(format!(
            "The store of responses, {}, fails: {error}. Try again, or ask with `store` false.",
            self.shown
        ))
    }

    /// The database's clock, by which heartbeats are told: clocks of gateways may differ.
    async fn now(&self) -> Result<i64, StoreError> {
        self.prepare().await?;
        let (now,): (i64,) = match &self.pool {
            Pool::Sqlite(pool) => {
                within(sqlx::query_as("SELECT unixepoch()").fetch_one(pool)).await?
            }
            Pool::Postgres(pool) => {
                let sql = "SELECT CAST(EXTRACT(EPOCH FROM now()) AS BIGINT)";
                within(sqlx::query_as(sql).fetch_one(pool)).await?
            }
        };
        Ok(now)
    }

    /// Whether the id is taken, by any key. Also shows that the store is there.
    pub async fn taken(&self, id: &str) -> Result<bool, StoreError> {
        let sql = "SELECT COUNT(*) FROM responses WHERE id = $1";
        let (count,): (i64,) = on!(self, pool => sqlx::query_as(sql).bind(id).fetch_one(pool))?;
        Ok(count > 0)
    }

    /// Keeps a response; whether its id was free.
    pub async fn insert(&self, record: &Record) -> Result<bool, StoreError> {
        let sql = "INSERT INTO responses (id, created, expires, status, background, streamed, \
                   owner, heartbeat, key_digest, previous, body, input) \
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
                   ON CONFLICT DO NOTHING";
        let created = record.created as i64;
        let heartbeat = if record.owner.is_some() { self.now().await? } else { 0 };
        let inserted = execute!(
            self,
            sql,
            &record.id,
            created,
            created.saturating_add_unsigned(self.ttl),
            record.status,
            i64::from(record.owner.is_some()),
            i64::from(record.streamed),
            &record.owner,
            heartbeat,
            &record.key,
            &record.previous,
            &record.body,
            &record.input
        )?;
        Ok(inserted == 1)
    }

    /// The response of this id and key.
    pub async fn get(&self, id: &str, key: &str) -> Result<Option<Stored>, StoreError> {
        let sql = "SELECT status, background, streamed, body, input FROM responses \
                   WHERE id = $1 AND key_digest = $2 AND expires > $3";
        type Row = (String, i64, i64, String, String);
        let now = unix_seconds() as i64;
        let row: Option<Row> = on!(self, pool => {
            sqlx::query_as(sql).bind(id).bind(key).bind(now).fetch_optional(pool)
        })?;
        Ok(row.map(|(status, background, streamed, body, input)| Stored {
            status,
            background: background != 0,
            streamed: streamed != 0,
            body,
            input,
        }))
    }

    /// The response's status; `None` when it is gone.
    pub async fn status(&self, id: &str) -> Result<Option<String>, StoreError> {
        let sql = "SELECT status FROM responses WHERE id = $1";
        let row: Option<(String,)> =
            on!(self, pool => sqlx::query_as(sql).bind(id).fetch_optional(pool))?;
        Ok(row.map(|(status,)| status))
    }

    /// The response object; `None` when it is gone.
    pub async fn body(&self, id: &str) -> Result<Option<String>, StoreError> {
        let sql = "SELECT body FROM responses WHERE id = $1";
        let row: Option<(String,)> =
            on!(self, pool => sqlx::query_as(sql).bind(id).fetch_optional(pool))?;
        Ok(row.map(|(body,)| body))
    }

    /// The turns up to this response, the first one first. A chain that is broken begins with a
    /// turn that has a previous one.
    pub async fn conversation(&self, id: &str, key: &str) -> Result<Vec<Turn>, StoreError> {
        let sql = "WITH RECURSIVE chain (id, previous, depth, size) AS ( \
                     SELECT id, previous, CAST(1 AS BIGINT), \
                            CAST(LENGTH(input) + LENGTH(body) AS BIGINT) \
                     FROM responses WHERE id = $1 AND key_digest = $2 AND expires > $3 \
                     UNION ALL \
                     SELECT r.id, r.previous, chain.depth + 1, \
                            chain.size + LENGTH(r.input) + LENGTH(r.body) \
                     FROM chain JOIN responses r ON r.id = chain.previous \
                     WHERE r.key_digest = $2 AND r.expires > $3 \
                           AND chain.depth < $4 AND chain.size < $5) \
                   SELECT r.id, r.previous, r.status, r.body, r.input \
                   FROM chain JOIN responses r ON r.id = chain.id ORDER BY chain.depth DESC";
        type Row = (String, Option<String>, String, String, String);
        let now = unix_seconds() as i64;
        let rows: Vec<Row> = on!(self, pool => {
            let query = sqlx::query_as(sql).bind(id).bind(key).bind(now);
            query.bind(MAX_TURNS as i64).bind(MAX_CONVERSATION as i64).fetch_all(pool)
        })?;
        let turn = |(id, previous, status, body, input)| Turn { id, previous, status, body, input };
        Ok(rows.into_iter().map(turn).collect())
    }

    /// A queued response is in progress now; whether it still was queued.
    pub async fn begin(&self, id: &str, body: &str) -> Result<bool, StoreError> {
        let sql = "UPDATE responses SET status = 'in_progress', body = $2 \
                   WHERE id = $1 AND status = 'queued'";
        Ok(execute!(self, sql, id, body)? == 1)
    }

    /// Ends a response that has not ended, with its last events; whether it had not.
    pub async fn finish(
        &self,
        id: &str,
        status: &str,
        body: &str,
        events: &[Event],
    ) -> Result<bool, StoreError> {
        let sql = "UPDATE responses SET status = $2, body = $3, owner = NULL \
                   WHERE id = $1 AND status IN ('queued', 'in_progress')";
        on!(self, pool => async {
            let mut transaction = pool.begin().await?;
            let query = sqlx::query(sql).bind(id).bind(status).bind(body);
            let ended = query.execute(&mut *transaction).await?.rows_affected() == 1;
            if ended && !events.is_empty() {
                let mut insert = insert_events(id, events);
                insert.build().execute(&mut *transaction).await?;
            }
            transaction.commit().await?;
            Ok(ended)
        })
    }

    /// Adds events of a response.
    pub async fn append(&self, id: &str, events: &[Event]) -> Result<(), StoreError> {
        if events.is_empty() {
            return Ok(());
        }
        on!(self, pool => async {
            insert_events(id, events).build().execute(pool).await?;
            Ok(())
        })
    }

    /// The events behind number `after`, at most `most`.
    pub async fn events(&self, id: &str, after: i64, most: i64) -> Result<Vec<Event>, StoreError> {
        let sql = "SELECT seq, payload FROM response_events \
                   WHERE response_id = $1 AND seq > $2 ORDER BY seq LIMIT $3";
        on!(self, pool => sqlx::query_as(sql).bind(id).bind(after).bind(most).fetch_all(pool))
    }

    /// The last event so far.
    pub async fn last_event(&self, id: &str) -> Result<Option<Event>, StoreError> {
        let sql = "SELECT seq, payload FROM response_events \
                   WHERE response_id = $1 ORDER BY seq DESC LIMIT 1";
        on!(self, pool => sqlx::query_as(sql).bind(id).fetch_optional(pool))
    }

    /// Which responses of this gateway have not ended.
    pub async fn alive(&self, owner: &str) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT id FROM responses WHERE owner = $1";
        let rows: Vec<(String,)> =
            on!(self, pool => sqlx::query_as(sql).bind(owner).fetch_all(pool))?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// Says that this gateway is there.
    pub async fn beat(&self, owner: &str) -> Result<(), StoreError> {
        let now = self.now().await?;
        execute!(self, "UPDATE responses SET heartbeat = $2 WHERE owner = $1", owner, now)?;
        Ok(())
    }

    /// Responses, at most `most`, whose gateway has not been heard of for some time. The one that
    /// asks is there, whatever its heartbeat says.
    pub async fn abandoned(
        &self,
        asking: &str,
        silent: Duration,
        most: i64,
    ) -> Result<Vec<String>, StoreError> {
        let sql = "SELECT id FROM responses \
                   WHERE owner IS NOT NULL AND owner <> $1 AND heartbeat < $2 LIMIT $3";
        let before = self.now().await? - silent.as_secs() as i64;
        let rows: Vec<(String,)> = on!(self, pool => {
            sqlx::query_as(sql).bind(asking).bind(before).bind(most).fetch_all(pool)
        })?;
        Ok(rows.into_iter().map(|(id,)| id).collect())
    }

    /// Deletes a response; whether there was one.
    pub async fn delete(&self, id: &str, key: &str) -> Result<bool, StoreError> {
        let sql = "DELETE FROM responses WHERE id = $1 AND key_digest = $2";
        Ok(execute!(self, sql, id, key)? == 1)
    }

    /// Deletes some of the responses whose time is over; how many.
    pub async fn expire(&self, most: i64) -> Result<u64, StoreError> {
        let sql = "DELETE FROM responses WHERE id IN \
                   (SELECT id FROM responses WHERE expires <= $1 LIMIT $2)";
        execute!(self, sql, unix_seconds() as i64, most)
    }

    /// Closes all connections.
    pub async fn close(&self) {
        let close = async {
            match &self.pool {
                Pool::Sqlite(pool) => pool.close().await,
                Pool::Postgres(pool) => pool.close().await,
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), close).await;
    }
}

fn insert_events<DB>(id: &str, events: &[Event]) -> QueryBuilder<DB>
where
    DB: sqlx::Database,
    String: sqlx::Encode<'static, DB> + sqlx::Type<DB>,
    i64: sqlx::Encode<'static, DB> + sqlx::Type<DB>,
{
    let mut insert = QueryBuilder::new("INSERT INTO response_events (response_id, seq, payload) ");
    insert.push_values(events, |mut row, (seq, payload)| {
        row.push_bind(id.to_owned()).push_bind(*seq).push_bind(payload.clone());
    });
    // A write that was given up may have been done all the same.
    insert.push(" ON CONFLICT DO NOTHING");
    insert
}

#[cfg(test)]
mod tests;
