//! `baton top`: how busy each pool and each worker is, over and over.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::time::{Duration, Instant};

use baton_membership::daemon::Failure;
use baton_proto::v1::{ClusterView, Instance, ListScalesRequest, ScaleOperation, WorkerStatus};
use clap::Args;

use super::ask::{Coordinator, CoordinatorArgs};
use super::status::new_table;

/// Flags of `baton top`.
#[derive(Clone, Debug, Args)]
pub struct TopArgs {
    /// Print one table and end.
    #[arg(long)]
    once: bool,

    /// Seconds between two tables; rates are over this time.
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = parse_seconds)]
    every: f64,

    /// Whom to ask.
    #[command(flatten)]
    coordinator: CoordinatorArgs,
}

/// Asks and prints until Ctrl-C, or once.
pub async fn run(args: TopArgs) -> Result<(), Failure> {
    let coordinator = args.coordinator.connect().await?;
    let every = Duration::from_secs_f64(args.every);
    let mut before = Sample::take(&coordinator).await?;
    loop {
        tokio::time::sleep(every).await;
        let now = Sample::take(&coordinator).await?;
        let text = draw(&before, &now);
        if args.once {
            println!("{text}");
            return Ok(());
        }
        // Home, each line to its end, and what is below.
        let text = text.replace('\n', "\x1b[K\n");
        print!("\x1b[H{text}\x1b[K\n\x1b[J");
        let _ = std::io::stdout().flush();
        before = now;
    }
}

/// The cluster at a moment.
struct Sample {
    at: Instant,
    view: ClusterView,
    operations: Vec<ScaleOperation>,
}

impl Sample {
    async fn take(coordinator: &Coordinator) -> Result<Self, Failure> {
        let view = coordinator.cluster().await?;
        let asked = coordinator.ask(async |mut it| it.list_scales(ListScalesRequest {}).await);
        Ok(Self { at: Instant::now(), view, operations: asked.await?.operations })
    }

    fn statuses(&self) -> HashMap<&str, &WorkerStatus> {
        let with = |it: &Instance| it.status.is_some();
        let instances = self.view.instances.iter().filter(|it| with(it));
        instances.filter_map(|it| Some((it.id.as_str(), it.status.as_ref()?))).collect()
    }
}

/// What is shown of a worker, or summed up of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Figures {
    running: u32,
    waiting: u32,
    blocks_used: u64,
    blocks: u64,
    tokens: f64,
    prompt_tokens: f64,
    hits: u64,
    queries: u64,
}

impl Figures {
    /// Of a worker now; rates since `before`.
    fn of(now: &WorkerStatus, before: Option<&WorkerStatus>, seconds: f64) -> Self {
        let rate = |now: u64, before: Option<u64>| {
            before.map_or(0.0, |before| now.saturating_sub(before) as f64 / seconds.max(1e-3))
        };
        let texts = before.map(|it| it.pooled_inputs);
        let generated = before.map(|it| it.generation_tokens);
        Self {
            running: now.running,
            waiting: now.waiting,
            blocks_used: now.kv_blocks_requests + now.kv_blocks_handoff,
            blocks: now.kv_blocks_total,
            tokens: rate(now.generation_tokens, generated) + rate(now.pooled_inputs, texts),
            prompt_tokens: rate(now.prompt_tokens, before.map(|it| it.prompt_tokens)),
            hits: now.prefix_cache_hits,
            queries: now.prefix_cache_queries,
        }
    }

    fn add(&mut self, other: &Self) {
        self.running += other.running;
        self.waiting += other.waiting;
        self.blocks_used += other.blocks_used;
        self.blocks += other.blocks;
        self.tokens += other.tokens;
        self.prompt_tokens += other.prompt_tokens;
        self.hits += other.hits;
        self.queries += other.queries;
    }

    fn cells(&self) -> [String; 6] {
        let percent = |part: u64, of: u64| match of {
            0 => "-".to_owned(),
            _ => format!("{:.0} %", 100.0 * part as f64 / of as f64),
        };
        [
            self.running.to_string(),
            self.waiting.to_string(),
            percent(self.blocks_used, self.blocks),
            format!("{:.0}", self.tokens),
            format!("{:.0}", self.prompt_tokens),
            percent(self.hits, self.queries),
        ]
    }
}

/// A worker, and its figures if it answers.
type Row<'a> = (&'a Instance, Option<Figures>);

/// The pools, each with its workers below it; then the operations that run.
fn draw(before: &Sample, now: &Sample) -> String {
    let seconds = now.at.duration_since(before.at).as_secs_f64();
    let earlier = before.statuses();
    let mut pools: BTreeMap<(&str, &str), Vec<Row<'_>>> = BTreeMap::new();
    for instance in &now.view.instances {
        if matches!(instance.role.as_str(), "gateway" | "coordinator") {
            continue;
        }
        let before = earlier.get(instance.id.as_str()).copied();
        let figures = instance.status.as_ref().map(|it| Figures::of(it, before, seconds));
        let pool = (instance.role.as_str(), instance.model.as_str());
        pools.entry(pool).or_default().push((instance, figures));
    }
    let mut table = new_table(&[
        "pool / worker",
        "state",
        "running",
        "waiting",
        "KV used",
        "out/s",
        "in/s",
        "cache hits",
    ]);
    for ((role, model), mut workers) in pools {
        workers.sort_by_key(|(instance, _)| (instance.started_ms, instance.id.clone()));
        let mut sum = Figures::default();
        workers.iter().filter_map(|(_, figures)| figures.as_ref()).for_each(|it| sum.add(it));
        let mut row = vec![format!("{role} ({model})"), format!("{} workers", workers.len())];
        row.extend(sum.cells());
        table.add_row(row);
        for (instance, figures) in workers {
            let name = match instance.name.as_str() {
                "" => &instance.id,
                name => name,
            };
            let state = match &instance.status {
                None => "silent",
                Some(status) if status.draining => "draining",
                Some(_) => "up",
            };
            let mut row = vec![format!("  {name}"), state.to_owned()];
            row.extend(figures.map_or(std::array::from_fn(|_| "?".into()), |it| it.cells()));
            table.add_row(row);
        }
    }
    let mut text = table.to_string();
    for it in now.operations.iter().filter(|it| it.ended_ms == 0) {
        text += &format!(
            "\nscaling {} from {} to {}: {} ({})",
            it.pool, it.from, it.size, it.phase, it.id
        );
    }
    if !now.view.etcd_connected {
        text += "\netcd does not answer: this is the last view known";
    }
    text
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|it: &f64| (0.1..=3600.0).contains(it));
    seconds.ok_or_else(|| "must be from 0.1 to 3600".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let before = WorkerStatus { generation_tokens: 100, ..Default::default() };
        let now = WorkerStatus {
            generation_tokens: 160,
            kv_blocks_total: 200,
            kv_blocks_requests: 50,
            prefix_cache_queries: 10,
            prefix_cache_hits: 9,
            running: 2,
            ..Default::default()
        };
        let figures = Figures::of(&now, Some(&before), 2.0);
        assert_eq!(figures.cells(), ["2", "0", "25 %", "30", "0", "90 %"]);
        // A worker that has just come has no rate yet; one that has been started again, none below 0.
        assert_eq!(Figures::of(&now, None, 2.0).tokens, 0.0);
        assert_eq!(Figures::of(&before, Some(&now), 2.0).tokens, 0.0);
        let mut sum = figures;
        sum.add(&figures);
        assert_eq!(sum.cells(), ["4", "0", "25 %", "60", "0", "90 %"]);
    }
}
