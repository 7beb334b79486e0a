//! Bugs that other ledgers shipped. Each test holds a naive version of a few lines, shows that it fails, and shows that ours does not.

use crate::{
    bench::{Bench, CALL_UCR, planning},
    billing_worker::{closed, signature, start},
    provider::client,
};
use futures_util::future::{BoxFuture, join};
use loopwright_activities::{
    billing::{BillingSettings, LedgerHook, purchase},
    orchestrator::{Candidate, Message, Orchestrator, Pace, Request, Role, Routing},
    provider::{Call, Completion, KeyIdentity, Provider, ProviderError, Timeouts},
    testing::{Act, Answer, Dialect, Endpoint, FakeProvider, Reply, Seen, Told},
    usage::CallState,
};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    client::Client,
    definition::RetryPolicy,
    hook::{AttemptEnd, Outcome, Transition, TransitionHook, Verdict},
    ids::RunId,
    signature::Signature,
    view::RunStatus,
    worker::{self, WorkerConfig},
};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::watch;
use uuid::Uuid;

/// What the model of [`Asked`] costs: 20 prompt tokens at 2 USD per million, and 10 or 1,000 output tokens at 10, in pico-USD.
const CHEAP_PUSD: i64 = 20 * 2_000_000 + 10 * 10_000_000;
const DEAR_PUSD: i64 = 20 * 2_000_000 + 1_000 * 10_000_000;

/// What is charged for calls that cost so much, at 120 credits for a USD. No rounding at these prices.
fn charge_of(cost_pusd: i64) -> i64 {
    cost_pusd * 12 / 100_000
}

/// A naive book: one balance of 100, and keys that were seen.
async fn naive(pool: &PgPool) {
    sqlx::raw_sql(
        "create table naive_balance (balance bigint not null); insert into naive_balance values (100);
         create table naive_key (key text primary key, amount bigint not null default 0)",
    )
    .execute(pool)
    .await
    .expect("naive");
}

async fn naive_balance(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select balance from naive_balance").fetch_one(pool).await.expect("balance")
}

/// Debits once per key, in one transaction: right as far as its key is right.
async fn naive_debit(pool: &PgPool, key: &str, amount: i64) {
    sqlx::query(
        "with k as (insert into naive_key values ($1, $2) on conflict do nothing returning amount)
         update naive_balance set balance = balance - k.amount from k",
    )
    .bind(key)
    .bind(amount)
    .execute(pool)
    .await
    .expect("debit");
}

fn question(name: &str) -> Request {
    Request {
        role: Role::Architect,
        purpose: "test".into(),
        messages: vec![Message::User { text: format!("call {name}") }],
        tools: vec![],
        output_schema: None,
        max_output_tokens: 1_000,
    }
}

/// Whether a call is the cheap one, by what is asked and not by any key.
fn is_cheap(messages: &[Message]) -> bool {
    messages == question("cheap").messages
}

/// Waits until it is raised.
async fn raised(flag: &watch::Sender<bool>) {
    flag.subscribe().wait_for(|up| *up).await.expect("its sender lives");
}

/// Two calls that cross: the cheap one is asked first, and its answer comes when the dear one is through.
#[derive(Default)]
struct Crossing {
    cheap_asked: watch::Sender<bool>,
    dear_through: watch::Sender<bool>,
}

/// The provider's client, with the cheap call's answer held back.
struct Crossed {
    client: Arc<dyn Provider>,
    crossing: Arc<Crossing>,
}

impl Provider for Crossed {
    fn name(&self) -> &'static str {
        self.client.name()
    }
    fn key(&self) -> KeyIdentity {
        self.client.key()
    }
    fn is_local(&self) -> bool {
        self.client.is_local()
    }
    fn complete<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Completion, ProviderError>> {
        Box::pin(async move {
            if !is_cheap(&call.request.messages) {
                return self.client.complete(call).await;
            }
            self.crossing.cheap_asked.send_replace(true);
            let answer = self.client.complete(call).await;
            raised(&self.crossing.dear_through).await;
            answer
        })
    }
}

/// Asks one of the two; in the first attempt the dear one only when the cheap one is under way.
async fn ask(ctx: &Context, orchestrator: &Orchestrator, crossing: &Crossing, name: &str) -> Option<String> {
    if name == "dear" && ctx.info().attempt == 1 {
        raised(&crossing.cheap_asked).await;
    }
    let reply = orchestrator.call(ctx, name, question(name)).await;
    if name == "dear" {
        crossing.dear_through.send_replace(true);
    }
    reply.ok().map(|reply| reply.text)
}

/// What calls brought, by attempt and name.
type Texts = BTreeMap<(u32, &'static str), Option<String>>;

/// What an activity asks in an attempt.
type Script = Arc<dyn Fn(Context, Orchestrator) -> BoxFuture<'static, ()> + Send + Sync>;

/// An activity that does as its script says, in two attempts: the first one fails whatever it got.
struct Asks(Orchestrator, Script);

impl Activity for Asks {
    fn signature(&self) -> Signature {
        signature()
    }
    fn run(&self, ctx: Context, _input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (attempt, asking) = (ctx.info().attempt, (self.1)(ctx.clone(), self.0.clone()));
        Box::pin(async move {
            asking.await;
            if attempt == 1 { Err(Failure::retryable("transient.again", "once more")) } else { Ok(json!({})) }
        })
    }
    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        json!({ "calls": [self.0.planned((Role::Architect, "test"), extras, 2, 100, 1_000)] })
    }
}

/// What two attempts of a script leave behind.
struct Asked {
    bench: Bench,
    /// Questions that the provider got.
    questions: usize,
}

impl Asked {
    /// Runs the script by a worker, on an orchestrator over a provider. The first question of each call in `lost` is not answered.
    async fn run(crossing: &Arc<Crossing>, lost: &[&'static str], script: Script) -> Self {
        let bench = Bench::new(100).await;
        sqlx::query(
            "insert into model_pricing (provider, model_id, effective_from, input_umtok, output_umtok, source)
             values ($1, 'some-model', '2026-01-01', 2000000, 10000000, 'test')",
        )
        .bind(Dialect::OpenAi.name())
        .execute(&bench.pool)
        .await
        .expect("price");
        let lost: Mutex<BTreeSet<&str>> = Mutex::new(lost.iter().copied().collect());
        let fake = FakeProvider::serve(move |seen: &Seen, _| {
            let name = if seen.body.to_string().contains("call cheap") { "cheap" } else { "dear" };
            if lost.lock().expect("no panic while held").remove(name) {
                return Answer::Acts(vec![Act::Reset]);
            }
            let output = if name == "cheap" { 10 } else { 1_000 };
            let told = Told { prompt: 20, output, ..Told::default() };
            Reply::text(&format!("answer to {name}")).with_usage(Some(told)).into()
        })
        .await;
        let shipped = Routing::rehearsed().roles[&Role::Architect][0].clone();
        let candidate = Candidate { provider: Dialect::OpenAi.name().into(), model: "some-model".into(), ..shipped };
        let routing = Routing { roles: BTreeMap::from([(Role::Architect, vec![candidate])]) };
        let client = client(Dialect::OpenAi, &fake.base_of(Dialect::OpenAi), Timeouts::default());
        let provider = Crossed { client, crossing: Arc::clone(crossing) };
        let pace = Pace { backoff: Duration::from_millis(1), ..Pace::default() };
        let orchestrator = Orchestrator::with_pace(routing, vec![Arc::new(provider)], pace);
        let hook = Arc::new(LedgerHook::new(BillingSettings::default()));
        let mut config = WorkerConfig::new(bench.pool.clone(), Registry::new().with(Asks(orchestrator, script)));
        config.hook = hook.clone();
        let worker = worker::start(config).await.expect("worker");
        let client = Client::new(bench.pool.clone(), hook);
        let retry = RetryPolicy { attempts: 2, delay_ms: 1, ..RetryPolicy::default() };
        let step = json!({"id": "ask", "kind": {"activity": {"name": "asks@1", "with": {}}}, "retry": retry});
        let run = start(&bench, &client, json!([step])).await;
        assert_eq!(closed(&client, run).await, RunStatus::Completed);
        worker.drain(Duration::from_secs(10)).await;
        let questions = fake.journal().iter().filter(|e| matches!(e.endpoint, Endpoint::Generate { .. })).count();
        Self { bench, questions }
    }

    /// Key, state and cost of each call, by key.
    async fn calls(&self) -> Vec<(String, String, i64)> {
        sqlx::query_as("select call_key, state, cost_pusd from api_key_usage order by call_key")
            .fetch_all(&self.bench.pool)
            .await
            .expect("calls")
    }
}

#[tokio::test]
async fn a_retry_above_the_tool_layer_is_no_second_charge() {
    let naive_bench = Bench::new(0).await;
    naive(&naive_bench.pool).await;
    // Naive: the layer below the retry makes up a key for each call that it sees.
    for _ in 0..2 {
        naive_debit(&naive_bench.pool, &Uuid::new_v4().to_string(), 10).await;
    }
    assert_eq!(naive_balance(&naive_bench.pool).await, 80, "charged twice");
    // Ours: a call has the name that its activity gives it. Whoever asks again under it, in the attempt or in the next one, gets the
    // answer that was bought; what was lost on the way is bought once more, and costs nothing the first time.
    let answered = ("succeeded", DEAR_PUSD);
    for (lost, expected) in [
        (vec![], vec![("dear.a1.0", answered)]),
        (vec!["dear"], vec![("dear.a1.0", ("unknown", 0)), ("dear.a1.1", answered)]),
    ] {
        let texts: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
        let got = Arc::clone(&texts);
        let script: Script = Arc::new(move |ctx, orchestrator| {
            let got = Arc::clone(&got);
            Box::pin(async move {
                for _ in 0..2 {
                    let reply = orchestrator.call(&ctx, "dear", question("dear")).await;
                    got.lock().expect("no panic while held").push(reply.ok().map(|reply| reply.text));
                }
            })
        });
        let asked = Asked::run(&Arc::default(), &lost, script).await;
        let calls: Vec<_> =
            expected.iter().map(|(key, (state, cost))| ((*key).into(), (*state).into(), *cost)).collect();
        assert_eq!(asked.calls().await, calls, "{lost:?}");
        assert_eq!(asked.questions, expected.len(), "{lost:?}");
        let mut same = vec![Some("answer to dear".to_owned()); 4];
        same[..lost.len()].fill(None);
        assert_eq!(*texts.lock().expect("no panic while held"), same);
        assert_eq!(asked.bench.balance().await, (100_000_000 - charge_of(DEAR_PUSD), 0), "{lost:?}");
        assert_eq!(asked.bench.violations().await, [""; 0]);
    }
}

#[tokio::test]
async fn settlements_are_keyed_by_what_was_charged_and_not_by_who_charges() {
    let bench = Bench::new(0).await;
    naive(&bench.pool).await;
    // Naive: one settlement per order. The second payment of a forwarded invoice is swallowed.
    for _charge in ["c1", "c2"] {
        naive_debit(&bench.pool, "order-1", -50).await;
    }
    assert_eq!(naive_balance(&bench.pool).await, 150, "200 were paid for");
    bench.order("ord", 50_000_000).await;
    for charge_id in ["c1", "c2", "c1", "c2"] {
        bench.pay(charge_id, "ord").await.expect("paid");
    }
    assert_eq!(bench.balance().await.0, 100_000_000);
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn a_guard_that_an_error_resets_does_not_refund_twice() {
    let bench = Bench::new(0).await;
    naive(&bench.pool).await;
    // Naive: the guard lives beside the work, and an error after the commit takes it back.
    let mut refunded = false;
    for try_no in 0..2 {
        if refunded {
            continue;
        }
        refunded = true;
        naive_debit(&bench.pool, &format!("refund-{try_no}"), -10).await;
        let notified: Result<(), &str> = if try_no == 0 { Err("the chat is away") } else { Ok(()) };
        if notified.is_err() {
            refunded = false;
        }
    }
    assert_eq!(naive_balance(&bench.pool).await, 120, "refunded twice");
    // Ours: the guard is the state of the payment, in the transaction of the refund. What follows that is another transaction, and it
    // fails; the whole is done again. The bot and Telegram: `server/tests/it/telegram/payments.rs`,
    // `an_error_after_a_refund_was_booked_does_not_book_it_again`.
    bench.buy("c1").await;
    sqlx::raw_sql(
        "create function is_away() returns trigger language plpgsql as $$ begin raise exception 'away'; end $$;
         create trigger is_away before update on payments for each row when (new.refund_state = 'done') execute function is_away()",
    )
    .execute(&bench.pool)
    .await
    .expect("trigger");
    let mut conn = bench.pool.acquire().await.expect("conn");
    let mut tried = Vec::new();
    for last in [false, false, true] {
        if last {
            sqlx::raw_sql("drop trigger is_away on payments").execute(&bench.pool).await.expect("it is there again");
        }
        let mut tx = bench.pool.begin().await.expect("tx");
        let refunded = purchase::refund(&mut tx, bench.user, "c1").await.expect("refund");
        tx.commit().await.expect("commit");
        tried.push((refunded, purchase::refund_done(&mut conn, "c1").await.is_ok()));
        assert_eq!(bench.balance().await.0, 0);
    }
    assert_eq!(tried, [(true, false), (false, false), (false, true)]);
    let taken: (i64, i64) =
        sqlx::query_as("select count(*), sum(amount_ucr)::bigint from credit_transactions where kind = 'refund'")
            .fetch_one(&bench.pool)
            .await
            .expect("refunds");
    let standing = purchase::refund_of(&mut conn, "c1").await.expect("read").expect("known");
    assert_eq!((taken.0, -taken.1, standing.state.as_str()), (1, standing.granted.0, "done"));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn parallel_calls_that_swap_their_order_keep_their_own_price() {
    // Naive: the n-th call of a step has the key n. In the repetition the other one is faster.
    let mut recorded: BTreeMap<usize, &str> = BTreeMap::new();
    for (n, call) in ["cheap", "dear"].into_iter().enumerate() {
        recorded.insert(n, call);
    }
    let repeated: Vec<bool> = ["dear", "cheap"].into_iter().enumerate().map(|(n, call)| recorded[&n] == call).collect();
    assert_eq!(repeated, [false, false], "each gets the other's answer and price");
    // Ours: a call has the name that its activity gives it, whoever is asked or answers first. The cheap one is asked first and answered
    // last, then the other way round; what the first attempt has of them is not bought again, and the rest is bought under its own name.
    let (cheap, dear) = (("succeeded", CHEAP_PUSD), ("succeeded", DEAR_PUSD));
    let unknown = ("unknown", 0);
    for (lost, expected) in [
        (vec![], vec![("cheap.a1.0", cheap), ("dear.a1.0", dear)]),
        (vec!["cheap"], vec![("cheap.a1.0", unknown), ("cheap.a2.0", cheap), ("dear.a1.0", dear)]),
        (vec!["dear"], vec![("cheap.a1.0", cheap), ("dear.a1.0", unknown), ("dear.a2.0", dear)]),
    ] {
        let texts: Arc<Mutex<Texts>> = Arc::default();
        let crossing: Arc<Crossing> = Arc::default();
        let (got, gates) = (Arc::clone(&texts), Arc::clone(&crossing));
        let script: Script = Arc::new(move |ctx, orchestrator| {
            let (got, gates) = (Arc::clone(&got), Arc::clone(&gates));
            Box::pin(async move {
                let attempt = ctx.info().attempt;
                let order = if attempt == 1 { ["cheap", "dear"] } else { ["dear", "cheap"] };
                let [first, second] = order.map(|name| ask(&ctx, &orchestrator, &gates, name));
                let (one, other) = join(first, second).await;
                let mut got = got.lock().expect("no panic while held");
                got.extend([((attempt, order[0]), one), ((attempt, order[1]), other)]);
            })
        });
        let asked = Asked::run(&crossing, &lost, script).await;
        let calls: Vec<_> =
            expected.iter().map(|(key, (state, cost))| ((*key).into(), (*state).into(), *cost)).collect();
        assert_eq!(asked.calls().await, calls, "{lost:?}");
        assert_eq!(asked.questions, expected.len(), "{lost:?}");
        let texts = texts.lock().expect("no panic while held").clone();
        assert_eq!(texts.len(), 4, "two in each attempt");
        for ((attempt, name), text) in &texts {
            let own = (*attempt == 2 || !lost.contains(name)).then(|| format!("answer to {name}"));
            assert_eq!(*text, own, "{lost:?}: attempt {attempt}, {name}");
        }
        // They did cross.
        let crossed: (String, String) = sqlx::query_as(
            "select (select call_key from api_key_usage order by id limit 1),
                    (select call_key from api_key_usage order by finished_at limit 1)",
        )
        .fetch_one(&asked.bench.pool)
        .await
        .expect("calls");
        assert_eq!(crossed, ("cheap.a1.0".into(), "dear.a1.0".into()), "{lost:?}");
        let charged = charge_of(CHEAP_PUSD) + charge_of(DEAR_PUSD);
        assert_eq!(asked.bench.balance().await, (100_000_000 - charged, 0), "{lost:?}");
        assert_eq!(asked.bench.violations().await, [""; 0]);
    }
}

#[tokio::test]
async fn a_marker_is_never_committed_before_the_debit() {
    let bench = Bench::new(100).await;
    naive(&bench.pool).await;
    // Naive: mark, commit, die; whoever comes back finds the mark and believes that the debit was done.
    for dies in [true, false] {
        let marked = sqlx::query("insert into naive_key values ('settled') on conflict do nothing")
            .execute(&bench.pool)
            .await
            .expect("mark")
            .rows_affected();
        if marked == 0 || dies {
            continue;
        }
        sqlx::query("update naive_balance set balance = balance - 10").execute(&bench.pool).await.expect("debit");
    }
    assert_eq!(naive_balance(&bench.pool).await, 100, "never charged");
    // Ours: end of the attempt, settlement and debit are one transaction; a death before its commit undoes all of it.
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    for dies in [true, false] {
        let end = AttemptEnd { attempt: attempt.clone(), outcome: Outcome::Succeeded, failure: None, again: false };
        let transition = Transition { ord: 0, run_id: attempt.run_id, ended: vec![end], started: vec![] };
        let mut tx = bench.pool.begin().await.expect("tx");
        bench.hook.apply(&mut tx, &[transition]).await.expect("settled");
        if dies {
            tx.rollback().await.expect("died");
            assert_eq!(bench.balance().await.0, 100_000_000);
        } else {
            tx.commit().await.expect("commit");
        }
    }
    assert_eq!(bench.balance().await, (100_000_000 - CALL_UCR, 0));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn two_that_check_at_once_cannot_both_write() {
    // Enough for one attempt of 1.44.
    let bench = Bench::new(2).await;
    naive(&bench.pool).await;
    let mut one = bench.pool.acquire().await.expect("conn");
    let mut two = bench.pool.acquire().await.expect("conn");
    // Naive: both read, both find enough, both write what they computed.
    let read = async |conn: &mut PgConnection| -> i64 {
        sqlx::query_scalar("select balance from naive_balance").fetch_one(conn).await.expect("read")
    };
    let (first, second) = (read(&mut one).await, read(&mut two).await);
    let mut spent = 0;
    for (conn, seen) in [(&mut one, first), (&mut two, second)] {
        if seen >= 80 {
            sqlx::query("update naive_balance set balance = $1")
                .bind(seen - 80)
                .execute(&mut **conn)
                .await
                .expect("write");
            spent += 80;
        }
    }
    assert!(spent == 160 && naive_balance(&bench.pool).await == 20, "160 of 100 were spent, and 20 are left");
    // Ours: the check is made under the lock of the user row; the second waits for the first and sees what it left.
    let (a, b) = (bench.attempt(RunId::new(), 1), bench.attempt(RunId::new(), 1));
    let start =
        |attempt| Transition { ord: 0, run_id: RunId::new(), ended: vec![], started: vec![planning(attempt, 1)] };
    let mut first = bench.pool.begin().await.expect("tx");
    assert!(bench.hook.apply(&mut first, &[start(&a)]).await.expect("applied").is_empty());
    let late = async {
        let mut second = bench.pool.begin().await.expect("tx");
        let refused = bench.hook.apply(&mut second, &[start(&b)]).await.expect("applied");
        second.rollback().await.expect("rollback");
        refused
    };
    let commit = async {
        // The second has to wait for the lock.
        bench.until_somebody_waits().await;
        first.commit().await.expect("commit");
    };
    let (refused, ()) = tokio::join!(late, commit);
    assert_eq!(refused.len(), 1, "only one of them starts");
    assert_eq!(bench.balance().await, (2_000_000, 1_440_000));
    assert_eq!(bench.violations().await, [""; 0]);
}

#[tokio::test]
async fn an_outcome_that_nobody_knows_is_not_replayed() {
    let bench = Bench::new(100).await;
    naive(&bench.pool).await;
    // Naive: a time-out after sending is tried again. The provider had served both.
    let mut served = 0;
    for answered in [false, true] {
        served += 1;
        naive_debit(&bench.pool, &format!("try-{served}"), 10).await;
        if answered {
            break;
        }
    }
    assert_eq!((served, naive_balance(&bench.pool).await), (2, 80), "bought and charged twice");
    // Ours: it is recorded as unknown and free, and its name is used up: neither this attempt nor a late report changes that.
    let attempt = bench.attempt(RunId::new(), 1);
    bench.start(&attempt).await;
    bench.open(&attempt, "a.0", 100).await;
    bench.close(&attempt, "a.0", CallState::Unknown, 0, 0).await;
    let again = bench.open(&attempt, "a.0", 100).await;
    assert!(matches!(&again, Verdict::Refused { reason, .. } if reason == "internal.call_repeated"), "{again:?}");
    bench.close(&attempt, "a.0", CallState::Succeeded, 1_000, 100).await;
    bench.end(&attempt, Outcome::Failed).await;
    let row: (String, i64) =
        sqlx::query_as("select state, cost_pusd from api_key_usage").fetch_one(&bench.pool).await.expect("one call");
    assert_eq!((row, bench.balance().await), (("unknown".to_owned(), 0), (100_000_000, 0)));
    assert_eq!(bench.violations().await, [""; 0]);
}
