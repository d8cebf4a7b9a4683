//! Who a worker is in its cluster, which may change while it runs.
//!
//! A change has three parts. The worker drains. Its record is withdrawn, and it becomes another
//! instance: whatever others know of the old one is void. It takes requests in its new role, and is
//! registered so. Model, adapters and KV cache stay as they are. Whoever still asks for what it
//! did before is told that it drains, and goes elsewhere.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::InstanceRole;
use baton_proto::v1::{Role, WorkerStatus};
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tonic::Status;
use tracing::info;

use super::{Drain, Shared};

/// Between two looks at a worker that drains for a change.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Who a worker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Another after each change.
    pub instance_id: String,
    /// What it does.
    pub role: InstanceRole,
}

/// A worker as a member of its cluster, for who registers it.
#[derive(Clone)]
pub struct Member(pub(super) Arc<Shared>);

impl Member {
    /// Waits until it is to do something else and nothing hinders it: its requests are gone.
    pub async fn next_role(&self) -> InstanceRole {
        self.0.roles.next().await
    }

    /// Makes it another instance, which takes requests.
    pub fn change(&self, identity: Identity) {
        self.0.roles.change(identity, self.0.counted());
    }
}

/// Who a worker is now, and what it is to be.
pub(super) struct Roles {
    current: RwLock<Arc<Identity>>,
    /// Its lock is held while the drain begins or ends for it.
    wanted: watch::Sender<(InstanceRole, Option<Duration>)>,
    /// What it can be. Who does all alone is called otherwise where the model is one of speech.
    possible: [InstanceRole; 3],
    /// What the instances before this one counted.
    before: Mutex<WorkerStatus>,
    drain: Arc<Drain>,
}

impl Roles {
    pub(super) fn new(identity: Identity, speech: bool, drain: Arc<Drain>) -> Self {
        let whole = if speech { InstanceRole::Audio } else { InstanceRole::Unified };
        Self {
            wanted: watch::Sender::new((identity.role, None)),
            current: RwLock::new(Arc::new(identity)),
            possible: [InstanceRole::Prefill, InstanceRole::Decode, whole],
            before: Mutex::default(),
            drain,
        }
    }

    /// Who it is.
    pub(super) fn current(&self) -> Arc<Identity> {
        Arc::clone(&self.current.read())
    }

    /// Wants it to do something else, once it has got rid of its requests.
    pub(super) fn want(&self, role: Role, timeout: Option<Duration>) -> Result<(), Status> {
        let given = role.as_str_name();
        let role = self.possible.into_iter().find(|&possible| Role::from(possible) == role);
        let role = role.ok_or_else(|| {
            let names = self.possible.map(|role| Role::from(role).as_str_name()).join(", ");
            Status::invalid_argument(format!("`role` is {given}; it must be one of {names}"))
        })?;
        if role == self.current().role {
            // One that was drained by hand stays so.
            if self.wanted.borrow().0 != role {
                self.keep()?;
            }
            return Ok(());
        }
        self.wanted.send_modify(|wanted| {
            *wanted = (role, timeout);
            self.drain.begin(timeout);
        });
        Ok(())
    }

    /// Takes a change back that has not been made; the worker serves.
    ///
    /// # Errors
    /// As [`Drain::end`].
    pub(super) fn keep(&self) -> Result<(), Status> {
        let mut kept = Ok(());
        self.wanted.send_modify(|wanted| {
            *wanted = (self.current().role, None);
            kept = self.drain.end();
        });
        kept
    }

    /// See [`Member::next_role`].
    async fn next(&self) -> InstanceRole {
        let mut changes = self.wanted.subscribe();
        loop {
            let (role, timeout) = *changes.borrow_and_update();
            let look = async {
                if role == self.current().role {
                    std::future::pending().await
                }
                tokio::time::sleep(LOOK_EVERY).await;
            };
            tokio::select! {
                biased;
                // The sender is `self`'s.
                _ = changes.changed() => continue,
                () = look => {}
            }
            if self.drain.done() {
                return role;
            }
            // It may have been put back to service while it changed before; but not if that is what
            // is wanted now.
            self.wanted.send_if_modified(|wanted| {
                if wanted.0 == role {
                    self.drain.begin(timeout);
                }
                false
            });
        }
    }

    /// See [`Member::change`]; `status` is what the instances before counted.
    fn change(&self, identity: Identity, status: WorkerStatus) {
        let before = self.current();
        info!(was = %before.role, role = %identity.role, "another role");
        *self.before.lock() = status;
        *self.current.write() = Arc::new(identity);
        // Who is about to end drains on.
        let _ = self.drain.end();
    }

    /// A status with this instance's own counts, from one with all since the process began.
    pub(super) fn own(&self, mut status: WorkerStatus) -> WorkerStatus {
        subtract(&mut status, &self.before.lock());
        status.instance_id.clone_from(&self.current().instance_id);
        status
    }
}

/// Takes the counters of `before` from `status`. Gauges stay.
fn subtract(status: &mut WorkerStatus, before: &WorkerStatus) {
    macro_rules! subtract {
        ($($counter:ident)*) => {
            $(status.$counter = status.$counter.saturating_sub(before.$counter);)*
        };
    }
    subtract!(
        preemptions prompt_tokens generation_tokens prefix_cache_queries prefix_cache_hits
        handoff_requests handoff_failures handoff_bytes_shared_memory handoff_bytes_grpc
        handoff_bytes_cuda_ipc handoff_bytes_nccl
        spec_decode_drafts spec_decode_draft_tokens spec_decode_accepted_tokens
        constrained_tokens constraint_wait_us step_tokens released pooled_inputs pooled_batches
        busy_us computed_prompt_tokens requests finished
    );
    for (now, before) in [
        (&mut status.steps_by_tokens, &before.steps_by_tokens),
        (&mut status.ttft_by_us, &before.ttft_by_us),
        (&mut status.itl_by_us, &before.itl_by_us),
    ] {
        for (now, before) in now.iter_mut().zip(before) {
            *now = now.saturating_sub(*before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Computes;

    /// Has so many sequences, and drains or not.
    #[derive(Default)]
    struct Busy(Mutex<WorkerStatus>);

    impl Computes for Busy {
        fn status(&self) -> WorkerStatus {
            self.0.lock().clone()
        }
        fn drain(&self) {
            self.0.lock().draining = true;
        }
        fn undrain(&self) {
            self.0.lock().draining = false;
        }
        fn stop(&self) {}
    }

    fn roles() -> (Roles, Arc<Busy>) {
        let busy = Arc::new(Busy::default());
        let drain = Arc::new(Drain::new(busy.clone(), Duration::from_secs(60)));
        let identity = Identity { instance_id: "a".into(), role: InstanceRole::Prefill };
        (Roles::new(identity, false, drain), busy)
    }

    async fn soon(roles: &Roles) -> Option<InstanceRole> {
        tokio::time::timeout(Duration::from_millis(100), roles.next()).await.ok()
    }

    #[tokio::test]
    async fn a_change_waits_for_requests_and_can_be_taken_back() {
        let (roles, busy) = roles();
        assert_eq!(soon(&roles).await, None, "nothing is wanted");
        busy.0.lock().running = 1;
        roles.want(Role::Decode, None).expect("it can");
        assert!(busy.status().draining);
        assert_eq!(soon(&roles).await, None, "it is busy");
        roles.want(Role::Prefill, None).expect("it is one");
        assert!(!busy.status().draining);
        busy.0.lock().running = 0;
        assert_eq!(soon(&roles).await, None, "it was taken back");

        roles.want(Role::Decode, None).expect("it can");
        assert_eq!(soon(&roles).await, Some(InstanceRole::Decode));
        roles.change(
            Identity { instance_id: "b".into(), role: InstanceRole::Decode },
            WorkerStatus::default(),
        );
        assert!(!busy.status().draining);
        assert_eq!(soon(&roles).await, None, "it is one now");
    }

    #[tokio::test]
    async fn what_is_wanted_last_is_made_also_when_it_serves_again_in_between() {
        let (roles, busy) = roles();
        roles.want(Role::Decode, None).expect("it can");
        assert_eq!(soon(&roles).await, Some(InstanceRole::Decode));
        // Before the change is made.
        roles.keep().expect("it serves");
        roles.change(
            Identity { instance_id: "b".into(), role: InstanceRole::Decode },
            WorkerStatus::default(),
        );
        assert_eq!(soon(&roles).await, Some(InstanceRole::Prefill));
        assert!(busy.status().draining);
    }

    #[test]
    fn roles_that_the_model_does_not_have_are_refused_by_name() {
        let (roles, _) = roles();
        for role in [Role::Pooling, Role::Audio, Role::Unspecified] {
            let error = roles.want(role, None).expect_err("refused");
            assert!(error.message().contains("ROLE_UNIFIED"), "{error}");
        }
    }

    #[test]
    fn counters_begin_anew_and_gauges_stay() {
        let (roles, _) = roles();
        let status = WorkerStatus {
            running: 2,
            requests: 7,
            steps_by_tokens: vec![3, 4],
            adapters_version: 5,
            ..WorkerStatus::default()
        };
        roles.change(
            Identity { instance_id: "b".into(), role: InstanceRole::Decode },
            WorkerStatus { requests: 5, steps_by_tokens: vec![1, 4], ..WorkerStatus::default() },
        );
        let own = roles.own(status);
        assert_eq!((own.running, own.requests, own.adapters_version), (2, 2, 5));
        assert_eq!(own.steps_by_tokens, [2, 0]);
    }
}
