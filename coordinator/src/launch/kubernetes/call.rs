//! One call to the API of Kubernetes: its deadline, and how its failure is told.

use std::error::Error as _;
use std::time::Duration;

use crate::launch::LaunchError;

/// How long one call may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// What the coordinator's Role must allow, for those who have not bound it.
const ROLE: &str = "deploy/kubernetes/base/coordinator-rbac.yaml has the Role that it needs";

/// Why a call failed.
#[derive(Debug)]
pub(super) enum CallError {
    /// It took too long.
    Late,
    /// The server or the connection said so.
    Said(kube::Error),
}

/// Bounds a call.
pub(super) async fn within<T>(
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, CallError> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(CallError::Said),
        Err(_) => Err(CallError::Late),
    }
}

impl CallError {
    fn code(&self) -> u16 {
        match self {
            Self::Said(kube::Error::Api(status)) => status.code,
            _ => 0,
        }
    }
}

/// Whether the server has forgotten the version asked for.
pub(super) fn gone(error: &CallError) -> bool {
    error.code() == 410
}

/// The failure as an operator is told of it.
pub(super) fn refused(what: String, error: CallError) -> LaunchError {
    let code = error.code();
    // Refusals last until somebody does something about them; conflicts, until the next try.
    let passes = !(400..500).contains(&code) || matches!(code, 408 | 409 | 410 | 429);
    let why = match error {
        CallError::Late => format!("the API of Kubernetes did not answer within {CALL_TIMEOUT:?}"),
        CallError::Said(kube::Error::Api(status)) => match code {
            401 | 403 => format!("{} ({code}); {ROLE}", status.message),
            _ => format!("{} ({code})", status.message),
        },
        CallError::Said(error) => {
            // The outer errors only say which layer failed.
            let mut said = error.to_string();
            let mut source = error.source();
            while let Some(inner) = source {
                let inner_said = inner.to_string();
                if !said.contains(&inner_said) {
                    said += &format!(": {inner_said}");
                }
                source = inner.source();
            }
            said
        }
    };
    LaunchError::Kubernetes { what, why, passes }
}
