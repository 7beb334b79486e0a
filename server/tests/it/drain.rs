//! SIGTERM while a model is asked: real processes, a model that takes its time. What was bought is kept, the end is bounded, its
//! code is 0; a second SIGTERM does not wait.

use crate::{
    e2e::audited,
    processes::{GUARD, NEVER_MS, Stage},
    support::{read, run_of},
};
use loopwright_server::app;
use std::time::{Duration, Instant};

/// Beyond the time that is configured for a drain: the process, its connections, its way out.
const SLACK: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn a_call_under_way_is_heard_out_and_not_bought_again() {
    let mut stage = Stage::new().await;
    let (_server, address) = stage.server(10_000).await;
    let mut worker = stage.worker(60_000, 3_000);
    let project = stage.project(address).await;
    let (status, body) = read(stage.trigger(address, &project, "respond-async").send().await.unwrap()).await;
    assert_eq!(status, 202, "{body}");
    stage.asked().await;
    worker.terminate();
    let (status, _) = worker.end().await;
    assert_eq!(status.code(), Some(0), "{}", stage.logs());
    assert_eq!(stage.calls().await, [("succeeded".to_owned(), true)], "it was heard out");
    // Whoever goes on has the answer: a model that thinks for ever is not asked.
    let mut next = stage.worker(60_000, NEVER_MS);
    stage.works(3).await;
    stage.answered().await;
    assert_eq!(stage.calls().await.len(), 1, "it was not asked again");
    next.terminate();
    assert_eq!(next.end().await.0.code(), Some(0), "{}", stage.logs());
    audited(&stage.pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_bounded_whatever_the_model_does() {
    let mut stage = Stage::new().await;
    let (mut server, address) = stage.server(10_000).await;
    let mut worker = stage.worker(8_000, NEVER_MS);
    let project = stage.project(address).await;
    stage.trigger(address, &project, "respond-async").send().await.unwrap();
    stage.asked().await;
    worker.terminate();
    let (status, took) = worker.end().await;
    assert_eq!(status.code(), Some(0), "{}", stage.logs());
    assert!(took < Duration::from_secs(8) + SLACK, "{took:?}");
    // It was told to stop in time, so it handed the run back itself: nobody waits for a lease.
    assert!(!stage.said(2, "drain timed out"), "{}", stage.logs());
    let free = "select owner is null and parked from runs";
    assert!(sqlx::query_scalar::<_, bool>(free).fetch_one(&stage.pool).await.unwrap());
    assert_eq!(stage.calls().await, [("unknown".to_owned(), false)], "nobody pays for an answer that nobody has");
    // Now it has to be asked again, once.
    let mut next = stage.worker(60_000, 100);
    stage.answered().await;
    let calls = [("unknown".to_owned(), false), ("succeeded".to_owned(), true)];
    assert_eq!(stage.calls().await, calls);
    for process in [&mut next, &mut server] {
        process.terminate();
        assert_eq!(process.end().await.0.code(), Some(0), "{}", stage.logs());
    }
    audited(&stage.pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_ends_at_once() {
    let mut stage = Stage::new().await;
    let (_server, address) = stage.server(10_000).await;
    let mut worker = stage.worker(600_000, NEVER_MS);
    let project = stage.project(address).await;
    stage.trigger(address, &project, "respond-async").send().await.unwrap();
    stage.asked().await;
    worker.terminate();
    let began = Instant::now();
    while !stage.said(2, "once more stops at once") {
        assert!(began.elapsed() < GUARD, "it does not say that it stops");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    worker.terminate();
    let (status, took) = worker.end().await;
    assert_eq!(status.code(), Some(i32::from(app::EXIT_INTERRUPTED)), "{}", stage.logs());
    assert!(took < SLACK, "{took:?}, though the model would have taken longer");
    assert_eq!(stage.calls().await, [("started".to_owned(), false)], "it died in the middle");
    // As after any death: others take over and nothing is paid twice.
    let _next = stage.worker(60_000, 100);
    stage.answered().await;
    let calls = stage.calls().await;
    let paid = calls.iter().filter(|(_, paid)| *paid).count();
    assert_eq!((calls.len(), paid), (2, 1), "{calls:?}");
    audited(&stage.pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_answers_who_waits_for_a_model_and_the_loop_goes_on_without_it() {
    let mut stage = Stage::new().await;
    let (mut server, address) = stage.server(10_000).await;
    let _worker = stage.worker(60_000, 3_000);
    let project = stage.project(address).await;
    let waits = tokio::spawn(stage.trigger(address, &project, "wait=100").send());
    stage.asked().await;
    server.terminate();
    let (status, took) = server.end().await;
    assert_eq!(status.code(), Some(0), "{}", stage.logs());
    assert!(took < Duration::from_secs(10) + SLACK, "{took:?}");
    let first = waits.await.unwrap().expect("an answer, and no broken connection");
    let run = run_of(&first);
    let (code, body) = read(first).await;
    assert_eq!(code, 200, "{body}");
    // The same request to the next server is about the same run.
    let (_server, address) = stage.server(10_000).await;
    stage.answered().await;
    let again = stage.trigger(address, &project, "wait=100").send().await.unwrap();
    assert_eq!(run_of(&again), run);
    assert_eq!(read(again).await.0, 200);
    let runs = "select count(*) from runs where workflow = 'dev-loop'";
    assert_eq!(sqlx::query_scalar::<_, i64>(runs).fetch_one(&stage.pool).await.unwrap(), 1);
    assert_eq!(stage.calls().await, [("succeeded".to_owned(), true)]);
}
