//! What the books say of a pair, compared with what the provider's journal says and with arithmetic of our own.

use super::{
    pairs::{answer_of, cost_of},
    *,
};

/// A row of `api_key_usage`.
#[derive(Debug)]
struct Call {
    call_key: String,
    state: String,
    cost_pusd: i64,
    provider_request_id: Option<String>,
    http_status: Option<i32>,
    /// From announcement to end.
    seconds: f64,
    late: bool,
    attempt_id: Uuid,
    provider: String,
    model_requested: String,
    usage_source: String,
    error_class: String,
    tokens_prompt: Option<i64>,
    tokens_cached: Option<i64>,
    tokens_output: Option<i64>,
    tokens_reasoning: Option<i64>,
}

impl sqlx::FromRow<'_, PgRow> for Call {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            call_key: row.try_get("call_key")?,
            state: row.try_get("state")?,
            cost_pusd: row.try_get("cost_pusd")?,
            provider_request_id: row.try_get("provider_request_id")?,
            http_status: row.try_get("http_status")?,
            seconds: row.try_get("seconds")?,
            late: row.try_get("late")?,
            attempt_id: row.try_get("attempt_id")?,
            provider: row.try_get("provider")?,
            model_requested: row.try_get("model_requested")?,
            usage_source: row.try_get("usage_source")?,
            error_class: row.try_get("error_class")?,
            tokens_prompt: row.try_get("tokens_prompt")?,
            tokens_cached: row.try_get("tokens_cached")?,
            tokens_output: row.try_get("tokens_output")?,
            tokens_reasoning: row.try_get("tokens_reasoning")?,
        })
    }
}

impl Call {
    /// Whether it is one of the requests of the call `name`.
    fn is_of(&self, name: &str) -> bool {
        self.call_key == name || self.call_key.starts_with(&format!("{name}."))
    }
    /// Whether it was closed by whoever took its run over: its own worker said nothing.
    fn died(&self) -> bool {
        self.state == "unknown" && self.error_class.is_empty()
    }
    /// Whether its worker waited as long as a client of this test does, and lost patience.
    fn timed_out(&self) -> bool {
        self.state == "unknown" && self.error_class == "transient.network" && self.seconds >= FIRST_BYTE.as_secs_f64()
    }
    /// Its tokens; the cost stands elsewhere.
    fn usage(&self) -> Told {
        let tokens = |n: Option<i64>| u64::try_from(n.unwrap_or_default()).expect("not negative");
        Told {
            prompt: tokens(self.tokens_prompt),
            cached: tokens(self.tokens_cached),
            output: tokens(self.tokens_output),
            reasoning: tokens(self.tokens_reasoning),
            cost: String::new(),
        }
    }
}

/// What is wrong between the requests of one call and the questions that the provider got: the k-th of them is the k-th there. One of
/// which nothing is known but that it was announced may not have been sent.
fn differences(rows: &[&Call], asked: &[&Entry]) -> Vec<String> {
    let paired = |left_out: Option<usize>| {
        let rows = rows.iter().enumerate().filter(|(n, _)| Some(*n) != left_out).map(|(_, row)| *row);
        rows.zip(asked).filter_map(|(row, entry)| differs(row, entry)).collect::<Vec<_>>()
    };
    match rows.len().checked_sub(asked.len()) {
        Some(0) => paired(None),
        Some(1) => {
            let unsent = (0..rows.len()).filter(|n| rows[*n].died() && rows[*n].provider_request_id.is_none());
            let least = unsent.map(|n| paired(Some(n))).min_by_key(Vec::len);
            least.unwrap_or_else(|| vec![format!("one more row than {} questions: {rows:?}", asked.len())])
        }
        _ => vec![format!("{} rows, {} questions", rows.len(), asked.len())],
    }
}

/// What a row says other than the journal. A call whose worker died may have any answer; and so may one that was waited for in vain, on
/// a busy machine.
fn differs(row: &Call, entry: &Entry) -> Option<String> {
    let Call { call_key, state, http_status, provider_request_id: id, .. } = row;
    let (expected, statuses) = answer_of(&entry.answered, entry.dialect);
    let fits = if row.died() { http_status.is_none() } else { state == expected && statuses.contains(http_status) };
    let same = id.is_none() || *id == entry.provider_request_id;
    let what = || {
        format!("{call_key} is {state}, HTTP {http_status:?}, id {id:?}; should be {expected}, {statuses:?}: {entry:?}")
    };
    (!same || !(fits || row.timed_out())).then(what)
}

impl Bench {
    /// What is wrong with a pair's run that has ended. `fenced`: one of its workers ended in another way than the pair says.
    pub(super) async fn check(&self, pair: &Pair, user: Uuid, view: &RunView, fenced: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut note = |fine: bool, what: String| {
            if !fine {
                wrong.push(what);
            }
        };
        let code = view.failure.as_ref().map(|failure| failure.code.as_str());
        let expected = FINAL.iter().find(|(fault, _)| Some(fault) == pair.fault.as_ref()).map(|(_, code)| *code);
        note(code == expected, format!("ended as {:?} {:?}", view.status, view.failure));
        note((view.status == RunStatus::Completed) == expected.is_none(), format!("ended as {:?}", view.status));

        let rows: Vec<Call> = sqlx::query_as(
            "select k.call_key, k.state, k.cost_pusd, k.provider_request_id, k.http_status, k.late,
                    coalesce(extract(epoch from k.finished_at - k.started_at), 0)::float8 as seconds, k.attempt_id, k.provider, k.model_requested, k.usage_source,
                    coalesce(k.error_class, '') as error_class, k.tokens_prompt, k.tokens_cached, k.tokens_output, k.tokens_reasoning
             from api_key_usage k join activity_attempts a on a.id = k.attempt_id where a.run_id = $1 order by k.id",
        )
        .bind(view.run_id.0)
        .fetch_all(&self.pool)
        .await
        .expect("rows");
        let story = self.story(pair);
        // Every question was announced before it was sent; only what died in between was never sent.
        let unsent = usize::from(pair.death.0 == "before send");
        // What was refused was not sent either, and is no call that may have been billed.
        let refused: Vec<&Call> = rows
            .iter()
            .filter(|row| pair.refused && row.error_class == "transient.network" && !row.timed_out())
            .collect();
        note(
            refused.iter().all(|row| row.state == "failed" && row.provider_request_id.is_none()),
            format!("{refused:?}"),
        );
        note(pair.refused != refused.is_empty(), format!("{} calls were refused: {rows:?}", refused.len()));
        // Who dies while a refusal is being recorded leaves a call that is unknown, and was not sent.
        let unrecorded = pair.refused && pair.death.0 == "after reply" && rows.len() == story.len() + refused.len() + 1;
        note(
            unrecorded
                || rows.len() == story.len() + unsent + refused.len()
                || (fenced && rows.len() == story.len() + 1 - unsent + refused.len()),
            format!("{} rows, {} questions: {rows:?} {story:#?}", rows.len(), story.len()),
        );
        let sent: Vec<&Call> =
            rows.iter().filter(|row| !refused.iter().any(|other| std::ptr::eq(*other, *row))).collect();
        // Who dies around a call leaves it without a word of how it ended. Each worker dies once.
        let silent = sent.iter().filter(|row| row.died()).count();
        let deaths = usize::from(pair.death.1 != Death::Never) + usize::from(matches!(pair.death.1, Death::Second(..)));
        note(fenced || silent <= deaths, format!("{silent} calls are unknown for no reason, {deaths} workers died"));
        for name in ["a", "b"] {
            let rows: Vec<&Call> = sent.iter().copied().filter(|row| row.is_of(name)).collect();
            let asked: Vec<&Entry> = story.iter().filter(|(_, call)| call == name).map(|(entry, _)| entry).collect();
            for what in differences(&rows, &asked) {
                note(false, format!("{name}: {what}"));
            }
        }
        // The call under way when its worker was killed.
        let died_first = rows
            .iter()
            .find(|row| row.died() && row.call_key.starts_with(self.struck_call(pair)))
            .map(|row| &row.call_key);
        // By attempt, what its recorded answers cost by our own arithmetic.
        let mut priced: BTreeMap<Uuid, i128> = BTreeMap::new();
        for row in &rows {
            let Call {
                call_key: key, state, cost_pusd: cost, provider_request_id: id, late, error_class: class, ..
            } = row;
            note(state != "started", format!("{key} is open"));
            let told = |entry: &&(Entry, String)| id.is_some() && entry.0.provider_request_id.as_ref() == id.as_ref();
            let entries: Vec<_> = story.iter().filter(told).collect();
            note(id.is_none() || entries.len() == 1, format!("{key}: {} answers have the id {id:?}", entries.len()));
            // An answer that the model did not end well was served; everything else that failed is free, and so is one that the
            // provider has cut, whatever it had counted by then.
            let cut =
                entries.first().is_some_and(|(entry, _)| entry.answered == format!("{:?}", Fault::NoFinishReason));
            let spoiled = state == "failed" && class.starts_with("model.") && !cut;
            note(state == "succeeded" || spoiled || *cost == 0, format!("{key} is {state} ({class}) and costs {cost}"));
            note(!late || *cost == 0, format!("{key} came late and costs {cost}"));
            let struck = self.names(pair) && died_first == Some(key);
            note(!struck || id.is_some(), format!("{key} died behind its headers and has no id"));
            // What the model spoiled is charged where the provider reports what it took.
            if state != "succeeded" && !(spoiled && row.usage_source == "provider" && row.usage().output > 0) {
                note(*cost == 0, format!("{key} is {state} ({class}) and costs {cost}"));
                continue;
            }
            let [(entry, _)] = &*entries else {
                note(false, format!("{key} succeeded, and no answer has the id {id:?}"));
                continue;
            };
            // What the provider says that it has reported, word for word; an estimate only where it reported nothing.
            let reported = entry.usage.as_ref().filter(|_| row.usage_source == "provider");
            let silent = pair.fault == Some(Fault::UsageAbsent) || entry.stage < Stage::Finished;
            note(reported.is_some() || silent, format!("{key}: usage by {}, journal {entry:?}", row.usage_source));
            let recorded = row.usage();
            if let Some(reported) = reported {
                let same = Told { cost: reported.cost.clone(), ..recorded.clone() } == *reported;
                note(same, format!("{key}: recorded {recorded:?}, the provider reported {reported:?}"));
            }
            if !late {
                let usage = reported.unwrap_or(&recorded);
                let expected = cost_of(&row.provider, &row.model_requested, usage);
                // Of an estimate OpenRouter's own price row is the only measure; the audit checks that.
                // Of a cost that nobody believes its row is.
                let expected = expected.or((reported.is_none() || pair.doubts()).then_some(i128::from(*cost)));
                note(
                    expected == Some(i128::from(*cost)),
                    format!("{key} costs {cost}, by our arithmetic {expected:?}"),
                );
                *priced.entry(row.attempt_id).or_default() += expected.unwrap_or_default();
            }
        }
        // 100 credits for a USD and a fifth on top: 120 credits, 12 micro-credits for 100,000 pico-USD, rounded up once an attempt.
        let charge: i128 = priced.values().map(|pusd| (pusd * 12 + 99_999) / 100_000).sum();
        // What was answered and recorded is not asked again: its question is the last of its call.
        for name in ["a", "b"] {
            let done: Vec<&Call> = rows.iter().filter(|row| row.is_of(name) && row.state == "succeeded").collect();
            note(done.len() <= 1, format!("{name} was bought {} times", done.len()));
            note(done.len() == 1 || expected.is_some(), format!("{name} was never answered"));
            let last = story.iter().rfind(|(_, call)| call == name);
            if let (Some(row), Some((entry, _))) = (done.first(), last) {
                let same = row.provider_request_id == entry.provider_request_id;
                note(same, format!("{name} was asked again after it was answered"));
                // It is whole when its finish reason has been read: the client does not wait for what comes after it, and the
                // server may be on its last bytes.
                note(
                    entry.stage >= Stage::Body,
                    format!("{name} is recorded, and its answer got to {:?}", entry.stage),
                );
            }
        }
        let beside: (i64, i64, i64) = sqlx::query_as(
            "select (select count(*) from spending_limits where run_id = $1 and key = '(inherited)'), count(d.usage_id), count(f.id)
             from activity_attempts a join api_key_usage k on k.attempt_id = a.id and k.state = 'succeeded'
             left join cost_doubts d on d.usage_id = k.id and d.charged_pusd = k.cost_pusd and k.cost_pusd > 0
             left join reconcile_findings f on f.subject = d.usage_id::text and f.kind = 'cost_doubtful' and f.seen = 1
             where a.run_id = $1",
        )
        .bind(view.run_id.0)
        .fetch_one(&self.pool)
        .await
        .expect("rows");
        let doubted = if pair.doubts() { 2 } else { 0 };
        let expected_beside = (i64::from(pair.inherits()), doubted, doubted);
        note(
            beside == expected_beside,
            format!("limits taken over, doubts and findings {beside:?}, not {expected_beside:?}"),
        );
        let charged: Vec<(String, i64, i64)> = sqlx::query_as(
            "select a.state, (select count(*) from credit_transactions t where t.attempt_id = a.id and t.kind = 'hold')
                           - (select count(*) from credit_transactions t where t.attempt_id = a.id and t.kind = 'capture'),
                    (select coalesce(sum(-t.amount_ucr), 0) from credit_transactions t where t.attempt_id = a.id and t.kind = 'capture')::bigint
                  - ceil((select coalesce(sum(k.cost_pusd), 0) from api_key_usage k where k.attempt_id = a.id) * 120 / 10000000000.0 * 10000)::bigint
             from activity_attempts a where a.run_id = $1",
        )
        .bind(view.run_id.0)
        .fetch_all(&self.pool)
        .await
        .expect("attempts");
        for (state, open, difference) in charged {
            note(state != "running" && open == 0, format!("an attempt is {state} with {open} open holds"));
            note(difference == 0, format!("an attempt was charged {difference} more than its calls cost"));
        }
        let (balance, held, captured, given): (i64, i64, i64, i64) = sqlx::query_as(
            "select credit_balance_ucr, credit_held_ucr, (select coalesce(sum(-amount_ucr), 0)::bigint from credit_transactions
                     where user_id = u.id and kind = 'capture'), (select coalesce(sum(amount_ucr), 0)::bigint from credit_transactions
                     where user_id = u.id and counter_account = 'platform:adjustment') from users u where id = $1",
        )
        .bind(user)
        .fetch_one(&self.pool)
        .await
        .expect("user");
        note(held == 0 && balance == CREDITS * 1_000_000 - captured + given, format!("balance {balance}, held {held}"));
        note(i128::from(captured) == charge, format!("charged {captured}, by our arithmetic {charge}"));
        // Everything or nothing, and something was paid.
        let back = if pair.gets_back() { captured } else { 0 };
        note(given == back && (captured > 0 || !pair.gets_back()), format!("{given} of {captured} given back"));
        wrong.into_iter().map(|what| format!("{}: {what}", pair.name())).collect()
    }
}
