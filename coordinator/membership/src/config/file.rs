//! The file: tables, keys, and the lines that they are in.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml_edit::{Document, Item, Key, TableLike, Value};

use super::keys::Keys;

/// A file that is TOML and has no key that nobody knows.
pub(super) struct File {
    path: PathBuf,
    document: Document<String>,
}

/// A key of the file, and what it is given.
pub(super) struct Entry<'a> {
    pub(super) key: &'a str,
    pub(super) item: &'a Item,
    /// For messages: the key, its table, the file and the line.
    pub(super) place: String,
}

impl Entry<'_> {
    /// The value, or what is wrong with it.
    pub(super) fn value(&self) -> Result<&Value, String> {
        let table = || format!("{}: a table where a value is expected", self.place);
        self.item.as_value().ok_or_else(table)
    }
}

impl File {
    /// Reads a file.
    pub(super) fn read(path: &Path, keys: &Keys) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("--config {} cannot be read: {error}", path.display()))?;
        Self::parse(path, text, keys)
    }

    pub(super) fn parse(path: &Path, text: String, keys: &Keys) -> Result<Self, String> {
        let document = Document::parse(text.clone()).map_err(|error| {
            let start = error.span().map_or(text.len(), |span| span.start);
            let before = text.get(..start).unwrap_or(&text);
            let column = before.chars().rev().take_while(|it| *it != '\n').count() + 1;
            let message = error.message().lines().collect::<Vec<_>>().join(", ");
            format!("{}:{}:{column}: {message}", path.display(), line(before))
        })?;
        let file = Self { path: path.to_owned(), document };
        file.check(keys)?;
        Ok(file)
    }

    /// The keys of a table, or of the top.
    pub(super) fn entries<'a>(&'a self, table: Option<&'a str>) -> Vec<Entry<'a>> {
        let top: &'a dyn TableLike = self.document.as_table();
        let within = match table {
            None => Some(top),
            Some(name) => top.get(name).and_then(Item::as_table_like),
        };
        let keys = within.map(|within| within.iter().map(move |(key, _)| (within, key)));
        let entry = |(within, key): (&'a dyn TableLike, &'a str)| {
            let (found, item) = within.get_key_value(key)?;
            Some(Entry { key, item, place: self.place(found, table) })
        };
        keys.into_iter().flatten().filter_map(entry).collect()
    }

    /// Refuses what no program knows.
    fn check(&self, keys: &Keys) -> Result<(), String> {
        for Entry { key, item, place } in self.entries(None) {
            if keys.has_table(key) {
                if !item.is_table_like() {
                    return Err(format!("{place} must be a table: [{key}]"));
                }
                let unknown = self.entries(Some(key)).into_iter();
                let mut unknown = unknown.filter(|entry| !keys.has(Some(key), entry.key));
                if let Some(entry) = unknown.next() {
                    let way_out = keys.way_out(Some(key), entry.key);
                    return Err(format!("unknown key {}; {way_out}", entry.place));
                }
            } else if !keys.has(None, key) {
                let what = if item.is_value() { "key" } else { "table" };
                return Err(format!("unknown {what} {place}; {}", keys.way_out(None, key)));
            }
        }
        Ok(())
    }

    fn place(&self, key: &Key, table: Option<&str>) -> String {
        let path = self.path.display();
        let line = self.line(key.span());
        let table = table.map_or_else(String::new, |table| format!(" in [{table}]"));
        format!("`{}`{table} ({path}:{line})", key.get())
    }

    fn line(&self, span: Option<Range<usize>>) -> usize {
        let start = span.map_or(0, |span| span.start);
        line(self.document.raw().get(..start).unwrap_or_default())
    }
}

/// The line that follows this text, counted from 1.
fn line(before: &str) -> usize {
    before.matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<File, String> {
        let keys = Keys::of_tables([
            ("gateway", &["listen", "etcd", "lease-ttl", "api-key"][..]),
            ("worker", &["listen", "etcd", "lease-ttl", "model", "chunk-size"]),
        ]);
        File::parse(Path::new("baton.toml"), text.to_owned(), &keys)
    }

    #[test]
    fn entries_have_their_places() {
        let text = "etcd = ['x']\n\n[worker]\nmodel = 'm'\n";
        let file = parse(text).unwrap();
        let places = |table| -> Vec<String> {
            file.entries(table).into_iter().map(|entry| entry.place).collect()
        };
        assert_eq!(places(None), ["`etcd` (baton.toml:1)", "`worker` (baton.toml:3)"]);
        assert_eq!(places(Some("worker")), ["`model` in [worker] (baton.toml:4)"]);
        assert!(places(Some("gateway")).is_empty());
        for other in ["worker.model = 'm'", "worker = { model = 'm' }"] {
            let file = parse(other).unwrap();
            assert_eq!(file.entries(Some("worker")).len(), 1, "{other}");
        }
    }

    #[test]
    fn what_nobody_knows_is_refused_with_a_way_out() {
        for (text, expected) in [
            (
                "\n\n[gateway]\n\n[worker]\n\nchunk-sise = 1",
                "unknown key `chunk-sise` in [worker] (baton.toml:7); did you mean `chunk-size`?",
            ),
            (
                "[worker]\nchunk_size = 1",
                "unknown key `chunk_size` in [worker] (baton.toml:2); did you mean `chunk-size`?",
            ),
            ("etdc = 'x'", "unknown key `etdc` (baton.toml:1); did you mean `etcd`?"),
            ("model = 'x'", "unknown key `model` (baton.toml:1); it belongs in [worker]"),
            (
                "listen = 'x'",
                "unknown key `listen` (baton.toml:1); it belongs in [gateway] or [worker]",
            ),
            (
                "[gateway]\nmodel = 'x'",
                "unknown key `model` in [gateway] (baton.toml:2); it belongs in [worker]",
            ),
            ("[wroker]\n", "unknown table `wroker` (baton.toml:1); did you mean `worker`?"),
            (
                "xyzzy = 1",
                "unknown key `xyzzy` (baton.toml:1); `baton config --schema` has all there are",
            ),
            ("worker = 1", "`worker` (baton.toml:1) must be a table: [worker]"),
            ("[[worker]]", "`worker` (baton.toml:1) must be a table: [worker]"),
        ] {
            assert_eq!(parse(text).err().as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_not_toml_is_told_with_line_and_column() {
        for (text, place) in [
            ("etcd = 'x'\nlease-ttl = \n", "baton.toml:2:"),
            ("etcd = 'x'\n  etcd = 'y'\n", "baton.toml:2:3: duplicate key"),
            ("{}", "baton.toml:1:1: "),
        ] {
            let error = parse(text).err().unwrap();
            assert!(error.starts_with(place) && error.lines().count() == 1, "{text}: {error}");
        }
    }
}
