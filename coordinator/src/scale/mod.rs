//! Changes of a pool's size.
//!
//! * [`record`]: what etcd holds of an operation.
//! * [`machine`]: what it does next, as a pure decision.
//! * [`store`]: the records in etcd; every step is fenced by the leader's key.
//! * [`run`]: the leader's loop: observe, step, write or act.

pub mod machine;
pub mod record;
pub mod run;
pub mod store;
