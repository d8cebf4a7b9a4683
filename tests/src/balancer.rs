//! A real HAProxy or nginx before two gateways, with the configuration that operators are given.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use reqwest::Method;

use crate::deployed::Deployed;
use crate::http::Api;
use crate::ports;
use crate::process::{Process, Spec};

/// Which balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HAProxy.
    Haproxy,
    /// nginx.
    Nginx,
}

/// A running balancer.
#[derive(Debug)]
pub struct Balancer {
    process: Process,
    url: String,
    /// Where HAProxy tells what it sees.
    state: Option<String>,
}

impl Balancer {
    /// Starts a balancer on `host` before these gateways. Of `deploy/balancers` only addresses,
    /// the folder of nginx's files and HAProxy's user are exchanged: it runs as the test does, as
    /// it would otherwise outlive a test that is killed.
    pub fn start(kind: Kind, host: &str, gateways: [&str; 2], dir: &Path) -> Self {
        let name = match kind {
            Kind::Haproxy => "haproxy.cfg",
            Kind::Nginx => "nginx.conf",
        };
        let mut config = Deployed::read(&format!("balancers/{name}"));
        config.gateways(gateways);
        let listen = format!("{host}:{}", ports::free());
        let file = dir.join(name);
        let (program, args, state): (_, [OsString; 4], _) = match kind {
            Kind::Haproxy => {
                let state = format!("127.0.0.1:{}", ports::free());
                config.exchange("bind :80\n", &format!("bind {listen}\n"));
                config.exchange("127.0.0.1:8404", &state);
                config.exchange("  user haproxy\n  group haproxy\n", "");
                ("haproxy", ["-db".into(), "-V".into(), "-f".into(), (&file).into()], Some(state))
            }
            Kind::Nginx => {
                config.exchange("listen 80;", &format!("listen {listen};"));
                let dir = dir.to_str().expect("a path in UTF-8");
                config.exchange("/var/log/nginx/", &format!("{dir}/nginx-"));
                config.exchange("/run/", &format!("{dir}/"));
                // One process, which ends with the test.
                let alone = "daemon off; master_process off;";
                ("nginx", ["-c".into(), (&file).into(), "-g".into(), alone.into()], None)
            }
        };
        fs::write(&file, config.text).expect("write the configuration");
        let process = Process::start(&Spec::new(program, program.into(), args), dir);
        let state = state.map(|address| format!("http://{address}"));
        Self { process, url: format!("http://{listen}"), state }
    }

    /// The address that clients use.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether HAProxy has found both gateways; its table if not.
    pub async fn found_both(&self) -> Result<(), String> {
        let state = self.state.as_ref().expect("HAProxy");
        let table = Api::new(state, None).send(Method::GET, "/stats;csv", None, "").await;
        let table = table.map_err(|error| format!("{error:?}"))?.text;
        let up = |name: &str| table.lines().any(|line| is_up(line, name));
        if up("gateway-0") && up("gateway-1") { Ok(()) } else { Err(table) }
    }

    /// Ends it.
    pub fn kill(&mut self) {
        self.process.kill();
    }
}

/// Whether a line of HAProxy's table says that this gateway is up.
fn is_up(line: &str, name: &str) -> bool {
    let mut fields = line.split(',');
    fields.nth(1) == Some(name) && fields.nth(15) == Some("UP")
}
