//! `baton.v1.Coordinator`: the cluster as seen from here, and what it is told to change.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_membership::tls::incoming;
use baton_membership::{ClusterWatch, InstanceRecord, InstanceRole, Membership, MembershipError};
use baton_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use baton_proto::v1::{
    CancelScaleRequest, ClusterView, DrainInstanceRequest, GetClusterRequest, GetScaleRequest,
    Instance, ListPlansRequest, ListScalesRequest, Plans, ScaleOperation, ScaleOperations,
    ScaleRequest,
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

use crate::election::Election;
use crate::launch::{Launched, Launcher};
use crate::planner::run::{Decisions, Mode};
use crate::scale::record::Record;
use crate::scale::store::{Advanced, Begun, Operations, ScaleStore};
use crate::workers;

/// Time that requests get when a request to scale or to drain does not say.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(120);
/// The longest such time.
const MAX_DRAIN_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// How long the launcher may take to tell its workers' names.
const NAMES_WITHIN: Duration = Duration::from_secs(1);
/// How long a request waits for an operation of the planner to be undone.
const GIVE_WAY: Duration = Duration::from_secs(4);
/// The largest pool: more is a typo.
pub(crate) const MAX_SIZE: u32 = 1024;

/// The service.
pub struct CoordinatorService {
    /// The cluster's name.
    pub cluster: String,
    /// Who is there.
    pub watch: ClusterWatch,
    /// Who leads.
    pub election: Election,
    /// The scale operations.
    pub store: ScaleStore,
    /// Who starts and ends workers, if this coordinator can.
    pub launcher: Option<Arc<dyn Launcher>>,
    /// What the planner's decisions are for, and the last ones.
    pub plans: (Mode, Decisions),
}

impl CoordinatorService {
    /// Serves until `shutdown` resolves. `grpc.health.v1.Health` is for probes: without etcd the
    /// last view is still shown, so whoever answers serves.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<CoordinatorServer<Self>>().await;
        tonic::transport::Server::builder()
            .timeout(Duration::from_secs(5))
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .add_service(CoordinatorServer::new(self))
            .add_service(health)
            .serve_with_incoming_shutdown(incoming(listener), shutdown)
            .await
    }

    fn membership(&self) -> Arc<Membership> {
        Arc::clone(&self.watch.subscribe().borrow())
    }

    async fn launched(&self) -> Vec<Launched> {
        match &self.launcher {
            // Names are no reason to keep an operator waiting.
            Some(launcher) => match tokio::time::timeout(NAMES_WITHIN, launcher.list()).await {
                Ok(listed) => listed.unwrap_or_default(),
                Err(_) => Vec::new(),
            },
            None => Vec::new(),
        }
    }

    async fn operations(&self) -> Result<Operations, Status> {
        self.store.list().await.map_err(unavailable)
    }

    /// Takes back an operation, if it still runs and may be taken back.
    async fn take_back(&self, record: &Record) -> Result<(), Status> {
        let operations = self.operations().await?;
        let running = operations.running.iter().find(|it| it.record.id == record.id);
        let stored = running.filter(|it| it.record.phase.cancellable() && !it.record.cancel);
        if let Some(stored) = stored {
            // One that moves meanwhile is looked at again.
            self.store.cancel(stored).await.map_err(unavailable)?;
        }
        Ok(())
    }

    /// The pool that a request means.
    fn pool(&self, name: &str) -> Result<InstanceRole, Status> {
        if name.is_empty() {
            let membership = self.membership();
            let there = |role| membership.instances.values().any(|it| it.role == role);
            return Ok(match there(InstanceRole::Decode) || !there(InstanceRole::Unified) {
                true => InstanceRole::Decode,
                false => InstanceRole::Unified,
            });
        }
        named("pool", name, &InstanceRole::WORKERS)
    }

    /// The pool that new workers of another come from.
    fn donor(pool: InstanceRole, name: &str) -> Result<Option<InstanceRole>, Status> {
        if name.is_empty() {
            return Ok(None);
        }
        let changeable = [InstanceRole::Prefill, InstanceRole::Decode, InstanceRole::Unified];
        if !changeable.contains(&pool) {
            return Err(Status::invalid_argument(format!(
                "`from_pool` is `{name}`, but no worker can become one of pool `{pool}`"
            )));
        }
        let others: Vec<_> = changeable.into_iter().filter(|it| *it != pool).collect();
        named("from_pool", name, &others).map(Some)
    }

    /// The models that a pool has or can have.
    fn models(&self, pool: InstanceRole) -> Vec<String> {
        let offered = self.launcher.iter().flat_map(|launcher| launcher.models(pool));
        let membership = self.membership();
        let served = membership.instances.values().filter(|it| it.role == pool);
        let mut models: Vec<String> = offered.chain(served.map(|it| it.model.clone())).collect();
        models.sort();
        models.dedup();
        models
    }

    /// The model that a request means: the one that it names, or else the pool's only one.
    async fn model(&self, pool: InstanceRole, name: String) -> Result<String, Status> {
        let mut models = self.models(pool);
        if let Some(launcher) = &self.launcher
            && (models.is_empty() || (!name.is_empty() && !models.contains(&name)))
        {
            // Its pool may have been made a moment ago.
            launcher.look_anew().await;
            models = self.models(pool);
        }
        let list = models.join(", ");
        match models.len() {
            0 => Err(Status::invalid_argument(format!(
                "pool `{pool}` has no workers, and none can be launched: start coordinators with \
                 --workers FILE, with a command for this pool, or with --launcher kubernetes \
                 beside a StatefulSet of this pool"
            ))),
            _ if models.contains(&name) => Ok(name),
            1 if name.is_empty() => Ok(models.remove(0)),
            _ if name.is_empty() => Err(Status::invalid_argument(format!(
                "pool `{pool}` has several models; give `model`, one of {list}"
            ))),
            _ => Err(Status::invalid_argument(format!(
                "`model` is `{name}`; pool `{pool}` has {list}"
            ))),
        }
    }
}

/// The role of a field's value.
fn named(field: &str, value: &str, roles: &[InstanceRole]) -> Result<InstanceRole, Status> {
    roles.iter().copied().find(|role| role.as_str() == value).ok_or_else(|| {
        let names: Vec<_> = roles.iter().map(|role| role.as_str()).collect();
        let names = names.join(", ");
        Status::invalid_argument(format!("`{field}` is `{value}`; it must be one of {names}"))
    })
}

#[tonic::async_trait]
impl Coordinator for CoordinatorService {
    async fn get_cluster(
        &self,
        _request: Request<GetClusterRequest>,
    ) -> Result<Response<ClusterView>, Status> {
        let membership = self.membership();
        let launched = self.launched().await;
        let instances = membership.instances.values().map(|record| describe(record, &launched));
        Ok(Response::new(ClusterView {
            cluster: self.cluster.clone(),
            etcd_connected: membership.etcd_connected,
            leader: self.election.leader(),
            instances: futures::future::join_all(instances).await,
        }))
    }

    async fn scale(
        &self,
        request: Request<ScaleRequest>,
    ) -> Result<Response<ScaleOperation>, Status> {
        let ScaleRequest { pool, model, size, drain_timeout_ms, from_pool } = request.into_inner();
        if size > MAX_SIZE {
            let message = format!("`size` is {size}; it must be at most {MAX_SIZE}");
            return Err(Status::invalid_argument(message));
        }
        let longest = MAX_DRAIN_TIMEOUT.as_millis() as u64;
        let drain_timeout_ms = match drain_timeout_ms {
            0 => DRAIN_TIMEOUT.as_millis() as u64,
            given => given.min(longest),
        };
        let pool = self.pool(&pool)?;
        let model = self.model(pool, model).await?;
        let donor = Self::donor(pool, &from_pool)?;
        let request = Record { donor, ..Record::new(pool, model, size, drain_timeout_ms) };
        let until = Instant::now() + GIVE_WAY;
        loop {
            let request = request.clone();
            let record = match self.store.begin(request).await.map_err(unavailable)? {
                Begun::Runs(record) => return Ok(Response::new((&record).into())),
                Begun::Conflict(record) => record,
            };
            // The planner gives way to an operator: what cannot be taken back any more ends soon.
            if record.planned && Instant::now() < until {
                self.take_back(&record).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            let what = if record.cancel { "is being undone" } else { "is running" };
            return Err(Status::already_exists(format!(
                "operation {} {what}; wait for its end, or cancel it",
                record.describe()
            )));
        }
    }

    async fn get_scale(
        &self,
        request: Request<GetScaleRequest>,
    ) -> Result<Response<ScaleOperation>, Status> {
        let id = request.into_inner().id;
        let operations = self.operations().await?;
        let running = operations.running.iter().map(|stored| &stored.record);
        let found = running.chain(&operations.ended).find(|record| record.id == id);
        let found = found.ok_or_else(|| Status::not_found(format!("no operation {id}")))?;
        Ok(Response::new(found.into()))
    }

    async fn cancel_scale(
        &self,
        request: Request<CancelScaleRequest>,
    ) -> Result<Response<ScaleOperation>, Status> {
        let CancelScaleRequest { id, pool } = request.into_inner();
        let pool = if id.is_empty() { Some(self.pool(&pool)?) } else { None };
        // The leader may move it between our look and our write.
        for _ in 0..20 {
            let operations = self.operations().await?;
            let meant = |it: &Record| it.id == id || it.pools().any(|it| Some(it) == pool);
            let Some(stored) = operations.running.iter().find(|it| meant(&it.record)) else {
                let over = operations.ended.iter().find(|it| it.id == id);
                return Err(match (over, pool) {
                    (Some(over), _) => Status::failed_precondition(format!(
                        "operation {} is over",
                        over.describe()
                    )),
                    (None, Some(pool)) => {
                        Status::not_found(format!("no operation runs for pool `{pool}`"))
                    }
                    (None, None) => Status::not_found(format!("no operation {id}")),
                });
            };
            if !stored.record.phase.cancellable() {
                return Err(Status::failed_precondition(format!(
                    "it is too late to cancel operation {}: its workers are being ended",
                    stored.record.describe()
                )));
            }
            if let Advanced::Written(_) = self.store.cancel(stored).await.map_err(unavailable)? {
                return Ok(Response::new((&stored.record).into()));
            }
        }
        Err(Status::aborted("the operation moves too fast; try again"))
    }

    async fn list_scales(
        &self,
        _request: Request<ListScalesRequest>,
    ) -> Result<Response<ScaleOperations>, Status> {
        let operations = self.operations().await?;
        let running = operations.running.iter().map(|stored| &stored.record);
        let all = operations.ended.iter().chain(running);
        Ok(Response::new(ScaleOperations { operations: all.map(Into::into).collect() }))
    }

    async fn list_plans(
        &self,
        _request: Request<ListPlansRequest>,
    ) -> Result<Response<Plans>, Status> {
        let (mode, decisions) = &self.plans;
        if *mode == Mode::Off {
            let message = "this coordinator does not plan: start it with --planner";
            return Err(Status::failed_precondition(message));
        }
        if self.election.own().borrow().is_none() {
            let message = format!("coordinator {} leads; ask it", self.election.leader());
            return Err(Status::failed_precondition(message));
        }
        Ok(Response::new(Plans { mode: mode.as_str().into(), decisions: decisions.list() }))
    }

    async fn drain_instance(
        &self,
        request: Request<DrainInstanceRequest>,
    ) -> Result<Response<Instance>, Status> {
        let DrainInstanceRequest { instance, undo } = request.into_inner();
        let membership = self.membership();
        let launched = self.launched().await;
        let named = |record: &InstanceRecord| {
            let name = launched.iter().find(|it| it.address == record.address);
            record.id == instance
                || record.address == instance
                || name.is_some_and(|it| it.spec.name == instance)
        };
        let workers = membership.instances.values().filter(|it| it.role.is_worker());
        let record = workers.into_iter().find(|record| named(record)).ok_or_else(|| {
            let message = format!("no worker {instance}; `baton top` lists ids and names");
            Status::not_found(message)
        })?;
        let done = match undo {
            false => workers::drain(&record.address, MAX_DRAIN_TIMEOUT).await,
            true => workers::undrain(&record.address).await,
        };
        done.map_err(|status| {
            Status::unavailable(format!("{instance} does not answer: {}", status.message()))
        })?;
        Ok(Response::new(describe(record, &launched).await))
    }
}

async fn describe(record: &InstanceRecord, launched: &[Launched]) -> Instance {
    let status = match record.role.is_worker() {
        true => workers::status(&record.address).await.ok(),
        false => None,
    };
    let name = launched.iter().find(|it| it.address == record.address);
    Instance {
        id: record.id.clone(),
        role: record.role.to_string(),
        address: record.address.clone(),
        model: record.model.clone(),
        version: record.version.clone(),
        started_ms: record.started_ms,
        status,
        name: name.map(|it| it.spec.name.clone()).unwrap_or_default(),
    }
}

fn unavailable(error: MembershipError) -> Status {
    Status::unavailable(error.to_string())
}
