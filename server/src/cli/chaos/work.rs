//! What the runs of chaos do: each attempt shows its idempotency key to the recorder outside, some of them buy a call.

use super::recorder;
use crate::{
    app::{App, keep_working},
    cli::Context as Command,
    config::Config,
    postgres::Fallback,
};
use futures_util::future::BoxFuture;
use loopwright_activities::usage::{CallClosed, CallOpened, CallState, PlannedCall, Reserve, Usage, UsageSource};
use loopwright_engine::{
    Failure,
    activity::{Activity, Context, Registry},
    signature::Signature,
    worker::{self, WorkerConfig},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::watch;

/// The model that is paid for, without being asked: it has a price, so that the ledger moves.
const MODEL: (&str, &str) = ("rehearsed", "rehearsed/utility");
/// Tokens of a call: about 0.02 credits.
const TOKENS: (u64, u64) = (1_000, 100);
/// Key of the call and of the checkpoint of its answer.
pub(super) const ANSWER: &str = "answer";
/// A worker that is asked to stop has that long for what it has in hand.
const GRACE: Duration = Duration::from_secs(5);

/// Where an attempt fails, the first time that it counts. What is shown and saved by then differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stumble {
    Never,
    BeforeItShows,
    AfterItShowed,
    AfterItSaved,
}

#[derive(Deserialize)]
struct Input {
    stumble: u8,
    work_ms: u64,
}

impl Input {
    fn stumble(&self) -> Stumble {
        match self.stumble {
            1 => Stumble::BeforeItShows,
            2 => Stumble::AfterItShowed,
            3 => Stumble::AfterItSaved,
            _ => Stumble::Never,
        }
    }
}

/// What is saved, and given back by the step: the receipt of the recorder, and who got it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub(super) struct Answer {
    /// The sight.
    pub(super) n: u64,
    /// The sight that made the effect: this one, or one of an earlier attempt.
    pub(super) effect: u64,
    pub(super) attempt: u32,
}

/// `effect@1` shows its key; `paid@1` buys a call around that and saves the answer with the reading.
struct Effect {
    recorder: Arc<PathBuf>,
    paid: bool,
}

impl Effect {
    fn name(paid: bool) -> &'static str {
        if paid { "paid@1" } else { "effect@1" }
    }
}

impl Activity for Effect {
    fn signature(&self) -> Signature {
        Signature {
            name: Self::name(self.paid).into(),
            summary: "shows its idempotency key to the recorder of chaos".into(),
            input_schema: json!({
                "type": "object", "required": ["stumble", "work_ms"], "additionalProperties": false,
                "properties": { "stumble": { "type": "integer" }, "work_ms": { "type": "integer" } },
            }),
            output_schema: json!({
                "type": "object", "required": ["n", "effect", "attempt"],
                "properties": { "n": { "type": "integer" }, "effect": { "type": "integer" }, "attempt": { "type": "integer" } },
            }),
            run_timeout_ms: 30_000,
            heartbeat_timeout_ms: None,
            metered: self.paid,
            idempotent: true,
            failure_codes: vec!["transient.chaos".into()],
        }
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let (recorder, paid) = (self.recorder.clone(), self.paid);
        Box::pin(async move {
            let content = json!({ "activity": Self::name(paid), "input": input });
            let input: Input = serde_json::from_value(input).map_err(|e| broken(&e))?;
            let stumbles = |at: Stumble| {
                if ctx.info().counted == 1 && input.stumble() == at {
                    return Err(Failure::retryable("transient.chaos", "fails once, as it was asked to"));
                }
                Ok(())
            };
            if paid && let Some(answer) = ctx.checkpoint(ANSWER).await? {
                return Ok(answer);
            }
            stumbles(Stumble::BeforeItShows)?;
            if paid {
                ctx.meter_open(ANSWER, &json!(opened(&ctx))).await?;
            }
            let answer = show(&ctx, &recorder, content).await?;
            stumbles(Stumble::AfterItShowed)?;
            // The work: an outside call takes its time, and a death in it is what chaos is about.
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(input.work_ms)) => {}
                () = ctx.cancellation().cancelled() => ctx.check_cancelled()?,
            }
            if paid {
                ctx.meter_close(ANSWER, &json!(closed()), Some((ANSWER, &answer))).await?;
            }
            stumbles(Stumble::AfterItSaved)?;
            Ok(answer)
        })
    }

    fn reserve(&self, _: &Value, _extras: &Value) -> Value {
        let (input_tokens, output_tokens) = TOKENS;
        let candidates = vec![(MODEL.0.to_owned(), MODEL.1.to_owned())];
        json!(Reserve {
            calls: vec![PlannedCall { ceilings: Vec::new(), candidates, count: 1, input_tokens, output_tokens }]
        })
    }
}

fn broken(error: &dyn std::fmt::Display) -> Failure {
    Failure::permanent("internal.chaos", error.to_string())
}

async fn show(ctx: &Context, recorder: &std::path::Path, content: Value) -> Result<Value, Failure> {
    let info = ctx.info();
    let shown = recorder::Shown {
        key: info.idempotency_key.clone(),
        run: info.run_id.0,
        path: info.path.clone(),
        attempt: info.attempt,
        content,
    };
    let shown = recorder::show(recorder, &shown).await;
    let recorder::Receipt { n, effect } = shown.map_err(|e| Failure::retryable("transient.chaos", e.to_string()))?;
    Ok(json!(Answer { n, effect, attempt: info.attempt }))
}

fn opened(ctx: &Context) -> CallOpened {
    // No request is sent, so there is nothing to hash but the key.
    let digest = format!("{:0<64}", ctx.info().idempotency_key);
    CallOpened {
        provider: MODEL.0.into(),
        model: MODEL.1.into(),
        purpose: "chaos".into(),
        request_sha256: digest,
        key_fingerprint: "0".repeat(64),
        key_last4: String::new(),
        own_key_id: None,
        local: false,
        input_tokens_max: TOKENS.0,
        output_tokens_max: TOKENS.1,
        input_umtok_max: None,
        output_umtok_max: None,
    }
}

fn closed() -> CallClosed {
    let usage =
        Usage { tokens_prompt: TOKENS.0, tokens_output: TOKENS.1, source: UsageSource::Provider, ..Usage::default() };
    CallClosed {
        state: CallState::Succeeded,
        model_served: Some(MODEL.1.into()),
        provider_request_id: None,
        http_status: None,
        error_class: None,
        finish_reason: None,
        stream_completed: true,
        usage: Some(usage),
    }
}

/// The activities of chaos, over the recorder's socket.
pub(super) fn registry(recorder: PathBuf) -> Registry {
    let recorder = Arc::new(recorder);
    Registry::new().with(Effect { recorder: recorder.clone(), paid: false }).with(Effect { recorder, paid: true })
}

/// A worker of chaos: that of `loopwright worker`, with other activities and without their tools.
///
/// # Errors
/// The database cannot be reached when it starts.
pub(super) async fn run(command: Command, recorder: PathBuf, stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let config: Config = command.config;
    let app = App::open(config, Fallback::None).await?;
    let (queues, slots) = (app.config.worker.queues.clone(), app.config.worker.slots);
    let start = async || {
        let config = WorkerConfig {
            pool: app.pool.clone(),
            registry: registry(recorder.clone()),
            hook: app.hook.clone(),
            queues: queues.clone(),
            labels: Vec::new(),
            slots: u32::try_from(slots).unwrap_or(u32::MAX),
            retention: None,
            lease: Duration::from_millis(app.config.worker.lease_ms.into()),
        };
        Ok(worker::start(config).await?)
    };
    let done = keep_working(start, GRACE, stop).await;
    app.close().await;
    done
}
