-- Responses and their events. One text for SQLite and for PostgreSQL.
CREATE TABLE responses (
    id TEXT PRIMARY KEY,
    -- Unix time in seconds.
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    -- queued, in_progress, completed, incomplete, failed, cancelled
    status TEXT NOT NULL,
    -- 1 for a response that is generated without its client's connection.
    background BIGINT NOT NULL,
    -- 1 when its events are kept.
    streamed BIGINT NOT NULL,
    -- The gateway that generates it, while it does, and when that was last heard of.
    owner TEXT,
    heartbeat BIGINT NOT NULL,
    -- The digest of the key that made it, in hex; empty where no key is needed.
    key_digest TEXT NOT NULL,
    -- The response whose conversation it continues.
    previous TEXT,
    -- The response object, and the list of its input items, as JSON.
    body TEXT NOT NULL,
    input TEXT NOT NULL
);
CREATE INDEX responses_expires ON responses (expires);
CREATE INDEX responses_owner ON responses (owner, heartbeat) WHERE owner IS NOT NULL;
CREATE TABLE response_events (
    response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    -- The event's `sequence_number`.
    seq BIGINT NOT NULL,
    -- The event, as JSON.
    payload TEXT NOT NULL,
    PRIMARY KEY (response_id, seq)
);
