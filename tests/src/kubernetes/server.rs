//! How the scripted API server speaks: paths, lists, watches, and refusals.

use std::collections::HashMap;
use std::time::Duration;

use actix_web::dev::ServerHandle;
use actix_web::web::{self, Bytes, Data};
use actix_web::{App, HttpRequest, HttpResponse, HttpServer};
use futures::stream;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::objects::{Objects, Resource};
use super::{NAMESPACE, Shared};

/// What its clients must show.
pub(super) const TOKEN: &str = "token-of-the-coordinator";

/// A server in a thread of its own.
pub(super) struct Server {
    handle: ServerHandle,
    thread: std::thread::JoinHandle<()>,
}

impl Server {
    pub(super) async fn start(port: u16, objects: Shared) -> Self {
        let (started, handle) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            actix_web::rt::System::new().block_on(async move {
                let app = move || {
                    App::new().app_data(Data::new(objects.clone())).default_service(web::to(answer))
                };
                let server = HttpServer::new(app).workers(1).disable_signals().shutdown_timeout(0);
                let server = server.bind(("127.0.0.1", port)).expect("the port is free").run();
                let _ = started.send(server.handle());
                server.await.expect("it serves");
            });
        });
        Self { handle: handle.await.expect("it starts"), thread }
    }

    pub(super) async fn stop(self) {
        self.handle.stop(false).await;
        let joined = tokio::task::spawn_blocking(|| self.thread.join()).await;
        joined.expect("a thread").expect("it ended well");
    }
}

/// A failure, as Kubernetes words it.
fn failure(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

fn refuse(code: u16, reason: &str, message: &str) -> HttpResponse {
    let status = actix_web::http::StatusCode::from_u16(code).expect("a status");
    HttpResponse::build(status).json(failure(code, reason, message))
}

async fn answer(request: HttpRequest, body: Bytes, shared: Data<Shared>) -> HttpResponse {
    let token = request.headers().get("authorization").and_then(|it| it.to_str().ok());
    if token != Some(&format!("Bearer {TOKEN}")) {
        return refuse(401, "Unauthorized", "Unauthorized");
    }
    let query = web::Query::<HashMap<String, String>>::from_query(request.query_string());
    let query = query.expect("a query").into_inner();
    let path: Vec<&str> = request.path().trim_matches('/').split('/').collect();
    let method = request.method().as_str();
    let (resource, name, sub) = match path[..] {
        ["apis", "apps", "v1", "namespaces", NAMESPACE, "statefulsets"] => {
            (Resource::StatefulSets, "", "")
        }
        ["apis", "apps", "v1", "namespaces", NAMESPACE, "statefulsets", name, "scale"] => {
            (Resource::StatefulSets, name, "/scale")
        }
        ["api", "v1", "namespaces", NAMESPACE, "pods"] => (Resource::Pods, "", ""),
        _ => return refuse(404, "NotFound", "the server could not find the requested resource"),
    };
    let watches = query.get("watch").is_some_and(|watch| watch == "true");
    let verb = match (method, name.is_empty()) {
        ("GET", true) if watches => "watch",
        ("GET", true) => "list",
        ("GET", false) => "get",
        ("PATCH", false) => "patch",
        _ => return refuse(405, "MethodNotAllowed", "the server does not allow this method"),
    };
    let mut objects = shared.lock().expect("nobody panicked");
    let full = format!("{}{sub}", resource.as_str());
    let patch: Value = serde_json::from_slice(&body).unwrap_or_default();
    let detail = match verb {
        "watch" => query.get("resourceVersion").cloned().unwrap_or_default(),
        "patch" => format!("{name} {}", patch["spec"]["replicas"]),
        _ => name.to_owned(),
    };
    objects.requests.push(format!("{verb} {full} {detail}").trim_end().to_owned());
    if objects.forbidden == Some((verb, full.as_str())) {
        let group = if resource == Resource::Pods { "" } else { "apps" };
        let message = format!(
            "{full} is forbidden: User \"system:serviceaccount:{NAMESPACE}:coordinator\" cannot \
             {verb} resource \"{full}\" in API group \"{group}\" in the namespace \"{NAMESPACE}\""
        );
        return refuse(403, "Forbidden", &message);
    }
    match verb {
        "watch" => watch(&objects, &shared, resource, &query),
        "list" => HttpResponse::Ok().json(list(&mut objects, resource, &query)),
        _ if !objects.sets.contains_key(name) => {
            refuse(404, "NotFound", &format!("statefulsets.apps \"{name}\" not found"))
        }
        "get" => HttpResponse::Ok().json(objects.scale_of(name)),
        _ => {
            let seen = &patch["metadata"]["resourceVersion"];
            let current = &objects.sets[name]["metadata"]["resourceVersion"];
            if objects.conflicts > 0 || (!seen.is_null() && seen != current) {
                objects.conflicts = objects.conflicts.saturating_sub(1);
                let message = format!(
                    "Operation cannot be fulfilled on statefulsets.apps \"{name}\": the object has \
                     been modified; please apply your changes to the latest version and try again"
                );
                return refuse(409, "Conflict", &message);
            }
            let Some(replicas) = patch["spec"]["replicas"].as_u64() else {
                return refuse(422, "Invalid", "spec.replicas: Required value");
            };
            let manager = query.get("fieldManager").map_or("unknown", String::as_str);
            objects.scale(name, replicas, manager);
            HttpResponse::Ok().json(objects.scale_of(name))
        }
    }
}

/// Whether an object has the labels asked for.
fn selected(object: &Value, query: &HashMap<String, String>) -> bool {
    let selector = query.get("labelSelector").map_or("", String::as_str);
    selector.split(',').filter(|term| !term.is_empty()).all(|term| match term.split_once('=') {
        Some((key, value)) => object["metadata"]["labels"][key] == value,
        None => !object["metadata"]["labels"][term].is_null(),
    })
}

fn list(objects: &mut Objects, resource: Resource, query: &HashMap<String, String>) -> Value {
    let items: Vec<Value> =
        objects.of(resource).values().filter(|it| selected(it, query)).cloned().collect();
    let (api_version, kind) = resource.kind();
    json!({
        "apiVersion": api_version, "kind": format!("{kind}List"),
        "metadata": {"resourceVersion": objects.version.to_string()}, "items": items,
    })
}

struct Watch {
    shared: Shared,
    resource: Resource,
    query: HashMap<String, String>,
    from: u64,
    cuts: u64,
    until: Instant,
    broken: bool,
}

fn watch(
    objects: &Objects,
    shared: &Shared,
    resource: Resource,
    query: &HashMap<String, String>,
) -> HttpResponse {
    let from = query.get("resourceVersion").and_then(|it| it.parse().ok());
    let from: u64 = from.unwrap_or(objects.version);
    let seconds = query.get("timeoutSeconds").and_then(|it| it.parse().ok()).unwrap_or(1800);
    let watch = Watch {
        shared: shared.clone(),
        resource,
        query: query.clone(),
        from,
        cuts: objects.cuts,
        until: Instant::now() + Duration::from_secs(seconds),
        broken: false,
    };
    let events = stream::unfold(watch, async |mut watch| {
        let chunk = watch.next().await?;
        Some((chunk, watch))
    });
    HttpResponse::Ok().content_type("application/json").streaming(Box::pin(events))
}

impl Watch {
    /// The next line; an error cuts the connection.
    async fn next(&mut self) -> Option<Result<Bytes, std::io::Error>> {
        if self.broken {
            return Some(Err(std::io::Error::other("cut")));
        }
        let line = |kind: &str, object: &Value| {
            let line = json!({"type": kind, "object": object}).to_string() + "\n";
            Some(Ok(Bytes::from(line)))
        };
        loop {
            let (mut news, due) = {
                let objects = self.shared.lock().expect("nobody panicked");
                if objects.cuts > self.cuts {
                    self.broken = true;
                    let half = br#"{"type":"MODIFIED","object":{"kind":"#;
                    return Some(Ok(Bytes::from_static(half)));
                }
                if self.from < objects.forgotten {
                    let (from, last) = (self.from, objects.version);
                    self.until = Instant::now();
                    self.from = u64::MAX;
                    let message = format!("too old resource version: {from} ({last})");
                    return line("ERROR", &failure(410, "Expired", &message));
                }
                let next = objects.log.iter().find(|it| {
                    it.resource == self.resource
                        && it.version > self.from
                        && selected(&it.object, &self.query)
                });
                let due = next.map(|change| change.at + objects.lag);
                if let Some(change) = next.filter(|it| it.at + objects.lag <= Instant::now()) {
                    self.from = change.version;
                    return line(change.kind, &change.object);
                }
                (objects.news.subscribe(), due)
            };
            if let Some(due) = due {
                tokio::time::sleep_until(due.min(self.until)).await;
                if due <= self.until {
                    continue;
                }
                return None;
            }
            tokio::select! {
                _ = news.changed() => {}
                () = tokio::time::sleep_until(self.until) => return None,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    let version = self.shared.lock().expect("nobody panicked").version;
                    if self.from < version {
                        self.from = version;
                        let (api_version, kind) = self.resource.kind();
                        let metadata = json!({
                            "resourceVersion": version.to_string(), "creationTimestamp": null,
                        });
                        let bookmark =
                            json!({"apiVersion": api_version, "kind": kind, "metadata": metadata});
                        return line("BOOKMARK", &bookmark);
                    }
                }
            }
        }
    }
}
