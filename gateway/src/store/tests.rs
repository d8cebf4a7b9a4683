use std::path::PathBuf;

use super::*;

/// A store in a file of its own, which goes with it.
struct Own(Store, PathBuf);

impl Own {
    async fn new(name: &str, ttl: u64) -> Self {
        let folder =
            std::env::temp_dir().join(format!("baton-store-{}-{name}", std::process::id()));
        let place = Place::Sqlite(Some(folder.join("sub/responses.db")));
        let store = Store::open(&place, ttl).await.unwrap().unwrap();
        Self(store, folder)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.1);
    }
}

fn record(id: &str, previous: Option<&str>, owner: Option<&str>) -> Record {
    Record {
        id: id.into(),
        created: unix_seconds(),
        status: if owner.is_some() { "queued" } else { "completed" },
        owner: owner.map(Into::into),
        streamed: true,
        key: "k".into(),
        previous: previous.map(Into::into),
        body: format!("body {id}"),
        input: format!("input {id}"),
    }
}

#[tokio::test]
async fn a_response_is_found_by_its_key_alone_until_its_time_is_over() {
    let own = Own::new("found", 60).await;
    let store = &own.0;
    assert!(!store.taken("a").await.unwrap());
    assert!(store.insert(&record("a", None, None)).await.unwrap());
    assert!(!store.insert(&record("a", None, None)).await.unwrap());
    assert!(store.taken("a").await.unwrap());
    assert_eq!(store.get("a", "k").await.unwrap().unwrap().body, "body a");
    assert!(store.get("a", "other").await.unwrap().is_none());
    assert!(!store.delete("a", "other").await.unwrap());
    let old = Record { created: unix_seconds() - 60, ..record("b", None, None) };
    assert!(store.insert(&old).await.unwrap());
    assert!(store.get("b", "k").await.unwrap().is_none());
    assert_eq!(store.expire(10).await.unwrap(), 1);
    assert!(!store.taken("b").await.unwrap() && store.taken("a").await.unwrap());
    assert!(store.delete("a", "k").await.unwrap());
    use std::os::unix::fs::PermissionsExt as _;
    let file = std::fs::metadata(own.1.join("sub/responses.db")).unwrap();
    assert_eq!(file.permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_response_ends_once_and_takes_its_events_along() {
    let own = Own::new("ends", 60).await;
    let store = &own.0;
    store.insert(&record("a", None, Some("g"))).await.unwrap();
    let event = |seq| (seq, format!("event {seq}"));
    store.append("a", &[event(0), event(1)]).await.unwrap();
    store.append("a", &[]).await.unwrap();
    assert!(store.begin("a", "begun").await.unwrap());
    assert_eq!(store.alive("g").await.unwrap(), ["a"]);
    assert!(store.finish("a", "cancelled", "by a client", &[]).await.unwrap());
    assert!(!store.finish("a", "completed", "late", &[event(2)]).await.unwrap());
    assert!(store.alive("g").await.unwrap().is_empty());
    assert_eq!(store.status("a").await.unwrap().unwrap(), "cancelled");
    assert_eq!(store.events("a", -1, 10).await.unwrap(), [event(0), event(1)]);
    assert_eq!(store.events("a", 0, 10).await.unwrap(), [event(1)]);
    assert!(store.delete("a", "k").await.unwrap());
    assert!(store.events("a", -1, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn silent_gateways_are_found_by_their_heartbeat() {
    let own = Own::new("silent", 60).await;
    let store = &own.0;
    store.insert(&record("a", None, Some("g"))).await.unwrap();
    store.insert(&record("b", None, None)).await.unwrap();
    assert!(store.abandoned("h", Duration::from_secs(5), 10).await.unwrap().is_empty());
    let now = store.now().await.unwrap();
    assert!(now.abs_diff(unix_seconds() as i64) < 5);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let silent = Duration::from_secs(1);
    assert_eq!(store.abandoned("h", silent, 10).await.unwrap(), ["a"]);
    assert!(store.abandoned("g", silent, 10).await.unwrap().is_empty());
    store.beat("g").await.unwrap();
    assert!(store.abandoned("h", silent, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_conversation_is_read_from_its_beginning_and_a_gap_shows() {
    let own = Own::new("conversation", 60).await;
    let store = &own.0;
    for (id, previous) in [("a", None), ("b", Some("a")), ("c", Some("b"))] {
        store.insert(&record(id, previous, None)).await.unwrap();
    }
    let ids = async |last, key| -> Vec<String> {
        store.conversation(last, key).await.unwrap().into_iter().map(|turn| turn.id).collect()
    };
    assert_eq!(ids("c", "k").await, ["a", "b", "c"]);
    assert!(ids("c", "other").await.is_empty());
    assert!(ids("x", "k").await.is_empty());
    store.delete("a", "k").await.unwrap();
    let broken = store.conversation("c", "k").await.unwrap();
    assert_eq!(broken[0].previous.as_deref(), Some("a"));
}

#[tokio::test]
async fn gateways_that_start_together_share_a_file() {
    let folder = std::env::temp_dir().join(format!("baton-store-{}-both", std::process::id()));
    let place = Place::Sqlite(Some(folder.join("responses.db")));
    let opened = futures::future::join_all((0..4).map(|_| Store::open(&place, 60))).await;
    let stores: Vec<Store> = opened.into_iter().map(|store| store.unwrap().unwrap()).collect();
    let writes = stores.iter().enumerate().map(|(at, store)| async move {
        for n in 0..20 {
            let id = format!("{at}-{n}");
            assert!(store.insert(&record(&id, None, Some("g"))).await.unwrap());
            store.append(&id, &[(0, "e".into())]).await.unwrap();
        }
    });
    futures::future::join_all(writes).await;
    assert_eq!(stores[0].alive("g").await.unwrap().len(), 80);
    std::fs::remove_dir_all(&folder).unwrap();
}
