//! Faults in a running cluster, injected at random moments and counted.
//!
//! Real processes serve steady traffic whose answers are known ([`traffic`]), in a cluster as it
//! is run ([`bed`]): three members of etcd, two coordinators that own the workers, two gateways
//! behind HAProxy. A fault of one kind is injected again and again ([`fault`]), each time into a
//! cluster that is whole again, and what came of every request is counted ([`Row`]).
//!
//! * [`bed`]: the cluster.
//! * [`fault`]: what is done to it.
//! * [`link`]: a network that can be slow, lossy or cut.
//! * [`disk`]: a small disk that can be full.
//! * [`traffic`]: the requests, and what came of them.

pub mod bed;
pub mod disk;
pub mod fault;
pub mod link;
pub mod traffic;

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::Serialize;

use crate::load::stats::percentile;
use bed::Bed;
use fault::Fault;
use traffic::{Ending, Sent, Traffic};

/// Between a cluster that is whole and the next fault.
const CALM: std::ops::Range<u64> = 200..2000;

/// What came of the requests while faults of one kind were injected.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The kind.
    pub fault: &'static str,
    /// How often it was injected.
    pub injected: usize,
    /// Requests sent.
    pub sent: usize,
    /// Answered with every token right.
    pub right: usize,
    /// Refused or ended with an error of the API's form.
    pub refused: usize,
    /// Broken off with the gateway that they were on.
    pub cut: usize,
    /// Answered wrongly, or in a wrong form.
    pub wrong: usize,
    /// Without an end for a minute.
    pub hung: usize,
    /// Seconds from a fault's end until the cluster was whole again: the median and the longest.
    pub whole_again: [f64; 2],
    /// Seconds that a request took at most, from its sending to its end.
    pub longest: f64,
    /// What those that were not answered right ended with.
    pub failures: Vec<String>,
}

impl Row {
    fn of(fault: Fault, injected: usize, sent: &[Sent], whole_again: &[f64]) -> Self {
        let count = |is: fn(&Ending) -> bool| sent.iter().filter(|it| is(&it.ending)).count();
        let failed = sent.iter().filter(|it| it.ending != Ending::Right);
        let longest = sent.iter().map(|it| it.took).max().unwrap_or_default();
        Self {
            fault: fault.name(),
            injected,
            sent: sent.len(),
            right: count(|it| matches!(it, Ending::Right)),
            refused: count(|it| matches!(it, Ending::Refused(_))),
            cut: count(|it| matches!(it, Ending::Cut(_))),
            wrong: count(|it| matches!(it, Ending::Wrong(_))),
            hung: count(|it| matches!(it, Ending::Hung)),
            whole_again: [percentile(whole_again, 0.5), percentile(whole_again, 1.0)],
            longest: longest.as_secs_f64(),
            failures: failed.map(|it| format!("{it:?}")).collect(),
        }
    }

    /// Whether nothing was wrong, hung or dropped that need not be: a dead gateway takes its open
    /// requests along, and nothing else may fail.
    pub fn held(&self, fault: Fault) -> bool {
        let spared = self.sent - self.right - if fault.hits_gateway() { self.cut } else { 0 };
        let bearable = if fault.may_refuse() { self.refused } else { 0 };
        spared == bearable
    }
}

/// Injects faults of this kind, `times` of them, under load. `told` hears of each.
pub async fn run(fault: Fault, times: usize, seed: u64, mut told: impl FnMut(&str)) -> Row {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bed = Bed::start(fault.needs()).await;
    let traffic = fault.traffic(Traffic::learn(bed.url()).await);
    let mut whole_again = Vec::new();
    for n in 0..times {
        tokio::time::sleep(Duration::from_millis(rng.random_range(CALM))).await;
        let what = fault.inject(&mut bed, n, &mut rng).await;
        let ended = Instant::now();
        bed.whole().await;
        whole_again.push(ended.elapsed().as_secs_f64());
        told(&format!(
            "{} {}/{times}: {what}; whole again after {:.1} s; {}",
            fault.name(),
            n + 1,
            ended.elapsed().as_secs_f64(),
            traffic.summary(),
        ));
    }
    let mut sent = traffic.stop().await;
    for one in &mut sent {
        // Only a gateway's death excuses a broken connection, and only one that was its own.
        if let Ending::Cut(why) = &one.ending
            && !bed.hit.iter().any(|hit| explains(hit, one))
        {
            one.ending = Ending::Wrong(format!("broken off though its gateway lived: {why}"));
        }
    }
    bed.finish().await;
    Row::of(fault, times, &sent, &whole_again)
}

/// Whether a request that was broken off was on the gateway that was hit, then.
fn explains((gateway, from, until): &(String, Instant, Instant), sent: &Sent) -> bool {
    let ended = sent.at + sent.took;
    let on_it = sent.gateway.as_ref().is_none_or(|name| name == gateway);
    on_it && sent.at <= *until && ended >= *from
}

/// The rows as a table.
pub fn table(rows: &[Row]) -> String {
    let mut text = "| fault | injected | requests | right | clear error | cut | wrong | hung | \
                    whole again, s (median, longest) | longest request, s |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for row in rows {
        let Row { fault, injected, sent, right, refused, cut, wrong, hung, .. } = row;
        let [median, most] = row.whole_again;
        text += &format!(
            "| {fault} | {injected} | {sent} | {right} | {refused} | {cut} | {wrong} | {hung} | \
             {median:.1}, {most:.1} | {:.1} |\n",
            row.longest
        );
    }
    text
}
