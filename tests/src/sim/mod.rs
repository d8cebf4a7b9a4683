//! A simulated cluster, for what no test machine has: thousands of workers, and days.
//!
//! * [`workload`]: requests and when they come: published traces, days drawn by a seed.
//! * [`worker`]: one worker, which computes prompts and decodes.
//! * [`cluster`]: pools of workers; what happens, in the order of time.
//! * [`policy`]: who says how large pools are: nobody, utilization, the planner itself.
//!
//! Nothing is random once the requests are there, so a seed repeats a run. The simulator is held
//! against queues whose waits are known (`tests.rs`).

pub mod cluster;
pub mod policy;
pub mod worker;
pub mod workload;

#[cfg(test)]
mod tests;
