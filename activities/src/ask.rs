//! One question to a model whose answer has to make sense beyond its schema: asked again with the complaint until it does.

use crate::orchestrator::{Message, Orchestrator, Question, Reply};
use loopwright_engine::{Failure, activity::Context};

/// New answers that one attempt may buy: the second, with a complaint, cures what can be cured. An attempt that carries
/// on for a lost one shares its number, and what that one has bought counts.
const ANSWERS_PER_ATTEMPT: u32 = 2;

/// Asks under `key`, `key-2`, `key-3` … until `judge` accepts an answer. Recorded answers of earlier attempts are judged
/// again and cost nothing.
///
/// # Errors
/// `model.output_invalid`, retryable, with the last complaint; those of [`Orchestrator::call`].
pub(crate) async fn ask<T>(
    orchestrator: &Orchestrator,
    ctx: &Context,
    key: &str,
    mut question: Question,
    judge: impl Fn(&Reply) -> Result<T, String>,
) -> Result<(T, Reply), Failure> {
    let (mut complaint, mut bought) = (String::new(), 0);
    for n in 1..=ANSWERS_PER_ATTEMPT.saturating_mul(ctx.info().counted) {
        let key = if n == 1 { key.to_owned() } else { format!("{key}-{n}") };
        if !is_recorded(ctx, &key).await? {
            // Attempts that ended before they asked leave nothing to be bought in their stead.
            if bought == ANSWERS_PER_ATTEMPT {
                break;
            }
            bought += 1;
        }
        let reply = orchestrator.call(ctx, &key, question.clone()).await?;
        match judge(&reply) {
            Ok(value) => return Ok((value, reply)),
            Err(problem) => {
                let messages = &mut question.request.messages;
                messages.push(reply.to_message());
                messages.push(Message::User {
                    text: format!("That answer cannot be used: {problem}\nGive the whole answer again, corrected."),
                });
                complaint = problem;
            }
        }
    }
    Err(Failure::retryable("model.output_invalid", format!("the model's answer cannot be used: {complaint}")))
}

/// Whether the answer under `key` was bought by an earlier attempt: it is there for nothing.
pub(crate) async fn is_recorded(ctx: &Context, key: &str) -> Result<bool, Failure> {
    Ok(ctx.checkpoint(&format!("call:{key}")).await?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        orchestrator::{Request, Role, Routing},
        provider::scripted::Scripted,
    };
    use loopwright_engine::activity::{
        AttemptInfo,
        detached::{self, Recorder},
    };
    use std::sync::Arc;

    /// Asks in attempt `attempt`, the `counted`-th that counts, over what earlier ones recorded, and finds nothing good enough.
    async fn refused(recorder: &Arc<Recorder>, attempt: u32, counted: u32) {
        let script = Scripted::from_yaml("- at: \"*\"\n  reply: { text: no }\n").unwrap();
        let orchestrator = Orchestrator::new(Routing::rehearsed(), vec![Arc::new(script)]);
        let info = AttemptInfo { attempt, counted, ..detached::info("plan@1", serde_json::Value::Null) };
        let ctx = detached::context(info, Default::default(), recorder.clone());
        let request = Request {
            role: Role::Utility,
            purpose: "test".into(),
            messages: vec![Message::User { text: "say it".into() }],
            tools: vec![],
            output_schema: None,
            max_output_tokens: 100,
        };
        let never = |_: &Reply| Err::<(), _>("not good enough".to_owned());
        let failure = ask(&orchestrator, &ctx, "plan", Question::from(request), never).await.unwrap_err();
        assert_eq!(failure.code, "model.output_invalid");
        assert!(failure.message.contains("not good enough"), "{failure:?}");
    }

    fn bought(recorder: &Recorder) -> usize {
        recorder.readings.lock().unwrap().iter().filter(|(phase, ..)| *phase == "open").count()
    }

    #[tokio::test]
    async fn an_attempt_buys_two_answers_whatever_ended_those_before_it() {
        // Two attempts ended before they asked.
        let recorder = Arc::default();
        refused(&recorder, 3, 3).await;
        assert_eq!(bought(&recorder), 2);
        refused(&recorder, 4, 4).await;
        assert_eq!(bought(&recorder), 4, "two more, and the first two are judged again");
    }

    #[tokio::test]
    async fn an_attempt_that_carries_on_for_a_lost_one_buys_what_that_one_did_not() {
        let recorder = Arc::default();
        refused(&recorder, 1, 1).await;
        refused(&recorder, 2, 1).await;
        assert_eq!(bought(&recorder), 2);
    }
}
