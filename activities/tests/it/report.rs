//! Reports of what was spent, where several users, projects, models, activities and days could be mixed up.

use crate::bench::{Bench, closing, opening, planning};
use chrono::{DateTime, Utc};
use loopwright_activities::{
    billing::{
        MicroCredits,
        ledger::{self, Identity},
        report::{self, By, Span, Spent},
    },
    decimal::pusd_from_decimal,
    usage::CallState,
};
use loopwright_engine::{
    hook::{AttemptEnd, AttemptRef, Outcome, Phase},
    ids::RunId,
};
use serde_json::{Value, json};
use std::sync::Arc;
use uuid::Uuid;

/// One attempt: whose, what, the calls (model, output tokens), when it ended and with which failure.
struct Past<'a> {
    user: Uuid,
    project: Uuid,
    activity: &'a str,
    calls: &'a [(&'a str, u64)],
    ended_at: &'a str,
    failure: Option<&'a str>,
}

impl Past<'_> {
    async fn happens(&self, bench: &Bench) {
        let attributes = json!({"user_id": self.user.to_string(), "project_id": self.project.to_string()});
        let attempt = AttemptRef {
            activity: self.activity.into(),
            attributes: Arc::new(attributes),
            budget: Arc::new(Value::Null),
            ..bench.attempt(RunId::new(), 1)
        };
        assert_eq!(bench.transition(attempt.run_id, vec![], vec![planning(&attempt, 1)]).await, None);
        for (n, (model, output)) in self.calls.iter().enumerate() {
            let (key, mut call) = (format!("a.{n}"), opening(100));
            call["model"] = json!(model);
            bench.meter(&attempt, &key, Phase::Open, call).await;
            bench.meter(&attempt, &key, Phase::Close, closing(CallState::Succeeded, 1_000, *output)).await;
        }
        let outcome = if self.failure.is_some() { Outcome::Failed } else { Outcome::Succeeded };
        let failure = self.failure.map(str::to_owned);
        let end = AttemptEnd { attempt: attempt.clone(), outcome, failure, again: false };
        assert_eq!(bench.transition(attempt.run_id, vec![end], vec![]).await, None);
        sqlx::query("update activity_attempts set ended_at = $2 where id = $1")
            .bind(attempt.attempt_id.0)
            .bind(at(self.ended_at))
            .execute(&bench.pool)
            .await
            .expect("ended");
    }
}

fn at(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).expect("instant").with_timezone(&Utc)
}

async fn project(bench: &Bench, user: Uuid) -> Uuid {
    sqlx::query_scalar("insert into projects (user_id, name) values ($1, 'q') returning id")
        .bind(user)
        .fetch_one(&bench.pool)
        .await
        .expect("project")
}

/// An attempt on a user's own key: no hold, nothing charged.
async fn own_key(bench: &Bench, user: Uuid, ended_at: &str) {
    let attempt = Uuid::now_v7();
    sqlx::query(
        "insert into activity_attempts (id, run_id, path, activity, attempt_no, user_id, state, lease_expires_at, ended_at)
         values ($1, $1, 'step', 'implement@1', 1, $2, 'completed', engine_now(), $3)",
    )
    .bind(attempt)
    .bind(user)
    .bind(at(ended_at))
    .execute(&bench.pool)
    .await
    .expect("attempt");
    sqlx::query(
        "insert into api_key_usage (attempt_id, call_no, call_key, api_key_id, user_id, provider, model_requested, purpose, request_sha256,
           state, finished_at, tokens_prompt, tokens_output, usage_source, pricing_id, worst_pusd)
         select $1, 1, 'a.0', (select id from api_keys limit 1), $2, 'openai_compatible', 'own-model', 'test', sha256(''),
           'succeeded', engine_now(), 500, 50, 'provider', id, 0 from model_pricing where provider = 'openai_compatible' limit 1",
    )
    .bind(attempt)
    .bind(user)
    .execute(&bench.pool)
    .await
    .expect("call");
}

/// Key, attempts, calls, credits, uncollected, given back.
type Line = (String, i64, i64, String, String, String);

fn line(key: impl ToString, attempts: i64, calls: i64, credits: &str, uncollected: &str, given_back: &str) -> Line {
    (key.to_string(), attempts, calls, credits.into(), uncollected.into(), given_back.into())
}

async fn lines(bench: &Bench, by: By, span: Span) -> Vec<Line> {
    let mut conn = bench.pool.acquire().await.expect("conn");
    let rows = report::spent(&mut conn, by, span).await.expect("report");
    let line = |s: Spent| (s.key, s.attempts, s.calls, s.credits, s.uncollected, s.given_back);
    rows.into_iter().map(line).collect()
}

fn uncollected(line: &Line) -> &String {
    &line.4
}
fn given_back(line: &Line) -> &String {
    &line.5
}

fn sum(lines: &[Line], column: fn(&Line) -> &String) -> i64 {
    lines.iter().map(|line| pusd_from_decimal(column(line)).expect("decimal")).sum()
}

#[tokio::test]
async fn nothing_is_mixed_up_and_nothing_is_lost_by_any_key() {
    const ARCHITECT: &str = "rehearsed/architect";
    const IMPLEMENTER: &str = "rehearsed/implementer";
    const UTILITY: &str = "rehearsed/utility";
    const FIRST: &str = "2026-11-01T23:59:59Z";
    const SECOND: &str = "2026-11-02T00:00:00Z";
    let bench = Bench::new(100).await;
    let one = bench.user;
    let mut conn = bench.pool.acquire().await.expect("conn");
    let identity = Identity::Telegram(43);
    let (two, _) = ledger::ensure_user(&mut conn, &identity, MicroCredits::from_credits(100)).await.expect("user");
    drop(conn);
    let (first, second, third) = (bench.project, project(&bench, one).await, project(&bench, two).await);
    let past =
        |user, project, activity, calls, ended_at, failure| Past { user, project, activity, calls, ended_at, failure };
    past(one, first, "plan@1", &[(ARCHITECT, 100)], FIRST, None).happens(&bench).await;
    // Two models in one attempt, whose provider spoiled it: all of it comes back.
    let both: &[(&str, u64)] = &[(UTILITY, 100), (ARCHITECT, 100)];
    past(one, second, "implement@1", both, SECOND, Some("transient.http")).happens(&bench).await;
    // Ten thousand times the output that was announced: the hold does not cover it.
    past(two, third, "plan@1", &[(IMPLEMENTER, 1_000_000)], SECOND, None).happens(&bench).await;
    own_key(&bench, two, SECOND).await;

    // 1,000 prompt tokens each; 2 and 10, 0.3 and 2.5, 0.1 and 0.4 USD per million; 120 credits per USD; a hold of 1.44.
    let all = Span::default();
    let by_model = lines(&bench, By::Model, all).await;
    assert_eq!(
        by_model,
        [
            line("rehearsed/rehearsed/implementer", 1, 1, "300.036", "298.596", "0"),
            line("rehearsed/rehearsed/architect", 2, 2, "0.72", "0", "0.36"),
            line("rehearsed/rehearsed/utility", 1, 1, "0.0168", "0", "0.0168"),
            line("openai_compatible/own-model", 1, 1, "0", "0", "0"),
        ]
    );
    let by_user = lines(&bench, By::User, all).await;
    assert_eq!(by_user, [line(two, 2, 2, "1.44", "298.596", "0"), line(one, 2, 3, "0.7368", "0", "0.3768")]);
    assert_eq!(
        lines(&bench, By::Project, all).await,
        [
            line(third, 1, 1, "1.44", "298.596", "0"),
            line(second, 1, 2, "0.3768", "0", "0.3768"),
            line(first, 1, 1, "0.36", "0", "0"),
            line("none", 1, 1, "0", "0", "0"),
        ]
    );
    assert_eq!(
        lines(&bench, By::Activity, all).await,
        [line("plan@1", 2, 2, "1.8", "298.596", "0"), line("implement@1", 2, 3, "0.3768", "0", "0.3768")]
    );
    assert_eq!(
        lines(&bench, By::Day, all).await,
        [line("2026-11-01", 1, 1, "0.36", "0", "0"), line("2026-11-02", 3, 4, "1.8168", "298.596", "0.3768")]
    );
    // What is shared by model adds up to what is known by attempt.
    for column in [uncollected as fn(&Line) -> &String, given_back] {
        assert_eq!(sum(&by_model, column), sum(&by_user, column));
    }
    let of_one = Span { user: Some(one), from: Some(at(SECOND)), ..Span::default() };
    assert_eq!(
        lines(&bench, By::Model, of_one).await,
        [
            line("rehearsed/rehearsed/architect", 1, 1, "0.36", "0", "0.36"),
            line("rehearsed/rehearsed/utility", 1, 1, "0.0168", "0", "0.0168"),
        ]
    );
}

// By model only what an attempt got back by itself was counted.
#[tokio::test]
async fn what_a_failed_step_gave_back_of_its_earlier_attempts_counts_by_model_too() {
    let bench = Bench::new(100).await;
    let run = RunId::new();
    let (first, last) = (bench.attempt(run, 1), bench.attempt(run, 2));
    assert_eq!(bench.start(&first).await, None);
    for (key, model) in [("a.0", "rehearsed/architect"), ("a.1", "rehearsed/utility")] {
        let mut call = opening(100);
        call["model"] = json!(model);
        bench.meter(&first, key, Phase::Open, call).await;
        bench.meter(&first, key, Phase::Close, closing(CallState::Succeeded, 1_000, 100)).await;
    }
    bench.end(&first, Outcome::Lost).await;
    assert_eq!(bench.start(&last).await, None);
    bench.end_with(&last, Outcome::Failed, Some("transient.http"), false).await;
    let by_model = lines(&bench, By::Model, Span::default()).await;
    assert_eq!(
        by_model,
        [
            line("rehearsed/rehearsed/architect", 1, 1, "0.36", "0", "0.36"),
            line("rehearsed/rehearsed/utility", 1, 1, "0.0168", "0", "0.0168"),
        ]
    );
    let by_activity = lines(&bench, By::Activity, Span::default()).await;
    assert_eq!(by_activity, [line("work@1", 2, 2, "0.3768", "0", "0.3768")]);
    assert_eq!(sum(&by_model, given_back), sum(&by_activity, given_back));
}
