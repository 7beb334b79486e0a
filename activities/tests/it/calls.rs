//! The bench of `benches/calls` works: a hundredth of it, without a word about times.

// The bench's own door uses the rest.
#[allow(dead_code, unused_imports)]
#[path = "../../benches/calls/load/mod.rs"]
mod load;

use load::Options;
use std::time::Duration;

/// Round trips to Postgres that a call makes: its announcement and its end; a longer one also notes the provider's name. With a transaction
/// around each they were twenty-two. A call in fifty may say something twice.
const ROUND_TRIPS_MAX: f64 = 2.1;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundredth_of_the_load_adds_up() {
    let options = Options {
        runs: 10,
        calls: 10,
        think: Duration::from_millis(50),
        faults_percent: 10,
        child_arguments: ["calls::provider", "--exact", "--ignored", "--nocapture"].map(Into::into).into(),
        ..Options::default()
    };
    let outcome = load::run(&options, &|_| ()).await.unwrap();
    let table = outcome.report.table();
    assert!(outcome.adds_up, "{table}{:?}", outcome.broken);
    for name in ["calls a second at full speed", "p99", "WAL per call", "deadlocks", "1 % of the ordinary amounts"] {
        assert!(table.contains(name), "{name}: {table}");
    }
    let said: Vec<String> = outcome.said.iter().map(|(said, n)| format!("{n:.2} {said}")).collect();
    println!("{}", said.join("\n"));
    let value = |name: &str| outcome.report.figures.iter().find(|f| f.name.starts_with(name)).unwrap().value;
    let trips = value("round trips to Postgres");
    assert!((2.0..=ROUND_TRIPS_MAX).contains(&trips), "{trips}:\n{}", said.join("\n"));
    let once = |word: &str| outcome.said.iter().filter(|(said, _)| said.contains(word)).map(|(_, n)| n).sum::<f64>();
    assert!(once("call_announced(") >= 0.99 && once("call_ended(") >= 0.99, "asked first:\n{}", said.join("\n"));
    assert!(value("calls a second under") > 0.0 && value("added latency of a plain call under it, p50") > 0.0);
}

/// The provider's process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by the other test of this file in a process of its own"]
async fn provider() {
    load::child().await.unwrap();
}
