//! `baton plan`: what the planner last decided, and why.

use baton_membership::daemon::{Exit, Failure};
use baton_proto::v1::ListPlansRequest;
use clap::Args;
use serde_json::Value;

use super::ask::CoordinatorArgs;
use super::status::new_table;
use crate::scale::record::unix_ms;

/// Flags of `baton plan`.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// How many decisions.
    #[arg(long, default_value_t = 10, value_name = "NUMBER")]
    last: usize,

    /// All that went into each, as a line of JSON.
    #[arg(long)]
    json: bool,

    /// Whom to ask.
    #[command(flatten)]
    coordinator: CoordinatorArgs,
}

/// Asks the leader and prints.
pub async fn run(args: PlanArgs) -> Result<(), Failure> {
    let leader = args.coordinator.connect().await?.leader().await?;
    let plans = leader.ask(async |mut it| it.list_plans(ListPlansRequest {}).await).await?;
    let last = &plans.decisions[plans.decisions.len().saturating_sub(args.last)..];
    if args.json {
        last.iter().for_each(|line| println!("{line}"));
        return Ok(());
    }
    let broken =
        |error| Failure::new(Exit::Failure, format!("a decision that is no JSON: {error}"));
    let parsed: Result<Vec<Value>, _> = last.iter().map(|it| serde_json::from_str(it)).collect();
    println!("planner: {}", plans.mode);
    println!("{}", table(&parsed.map_err(broken)?, unix_ms()));
    Ok(())
}

fn table(plans: &[Value], now_ms: u64) -> String {
    let mut table = new_table(&[
        "ago",
        "pool",
        "size",
        "wanted",
        "target",
        "req/s",
        "expected",
        "waiting",
        "TTFT kept",
        "ITL kept",
        "why",
    ]);
    for plan in plans {
        let at = plan["decision"]["at_ms"].as_u64().unwrap_or(0);
        for pool in plan["decision"]["pools"].as_array().into_iter().flatten() {
            let inputs = &pool["inputs"];
            let number = |value: &Value| format!("{:.2}", value.as_f64().unwrap_or(0.0));
            let kept = |value: &Value| match value.as_f64() {
                Some(share) => format!("{:.1} %", 100.0 * share),
                None => "-".into(),
            };
            let text = |value: &Value| match value.as_str() {
                Some(text) => text.to_owned(),
                None => value.to_string(),
            };
            table.add_row([
                format!("{} s", now_ms.saturating_sub(at) / 1000),
                text(&pool["pool"]),
                text(&pool["size"]),
                text(&pool["wanted"]),
                text(&pool["target"]),
                number(&inputs["requests"]),
                number(&inputs["expected"]),
                text(&inputs["waiting"]),
                kept(&inputs["ttft_kept"]),
                kept(&inputs["itl_kept"]),
                text(&pool["reason"]),
            ]);
        }
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_decision_is_a_row_for_each_pool() {
        let inputs = json!({"requests": 2.0, "expected": 2.5, "waiting": 3, "ttft_kept": 0.913});
        let pool = json!({"pool": "decode/m", "size": 1, "wanted": 2, "target": 2, "reason": "up",
                          "inputs": inputs});
        let text = table(&[json!({"decision": {"at_ms": 1000, "pools": [pool]}})], 6000);
        let row = text.lines().find(|line| line.contains("decode/m")).unwrap();
        for part in ["5 s", "2.50", "91.3 %", "up"] {
            assert!(row.contains(part), "{part}: {row}");
        }
    }
}
