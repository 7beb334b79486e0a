//! The bench's long measurements, for seconds: whoever spends half an hour on them should not be the first to run them.

use loopwright_engine::{
    MIGRATIONS,
    bench::{self, Options},
    embedded::testing::{database, url},
};
use std::{sync::Mutex, time::Duration};

/// Half a second for each tenth beside the snapshot; what comes before it takes six.
const LENGTH: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn a_soak_of_seconds_measures_what_a_long_one_does_and_reaches_no_goal() {
    let pool = database(MIGRATIONS).await;
    let options = Options { database_url: Some(url(&pool)), percent: 2, soak: Some(LENGTH), ..Options::default() };
    let heard = Mutex::new(Vec::new());
    let progress = |what: &str| heard.lock().expect("no panic while held").push(what.to_owned());
    let report = bench::run(&options, &progress).await.expect("measured");
    let expected = ["a run of 10,000 steps", "steady load", "steady load beside a pinned snapshot"];
    assert_eq!(heard.into_inner().expect("no panic while held"), expected);
    let names: Vec<_> = report.figures.iter().map(|figure| figure.name).collect();
    assert_eq!(names, ["last steps of a run of 10,000", "steps/s in the worst tenth of a pinned snapshot"]);
    for figure in &report.figures {
        let (limit, goal) = (figure.limit.as_ref().expect("limit"), figure.goal.as_ref().expect("goal"));
        // In its worst half second a busy machine may come to nothing.
        assert!(figure.value.is_finite(), "{figure:?}");
        assert!(limit.value > 0.0 && limit.value.is_finite(), "{figure:?}");
        assert!(figure.details.iter().all(|detail| detail.value.is_finite()), "{figure:?}");
        // Too short, and too few steps: said of each, whatever was measured.
        assert!(!goal.reached && goal.void.len() == 1, "{figure:?}");
    }
    let [long, pinned] = &report.figures[..] else { panic!("{report:?}") };
    let detail = |name| pinned.details.iter().find(|detail| detail.name == name).expect(name).value;
    let (before, length) = (detail("before it"), detail("length"));
    assert!(long.value > 0.0 && before > 0.0 && length == LENGTH.as_secs_f64(), "{long:?} {pinned:?}");
}
