//! One question to a model whose answer has to make sense beyond its schema: asked again with the complaint until it does.

use crate::orchestrator::{Message, Orchestrator, Question, Reply};
use loopwright_engine::{Failure, activity::Context};

/// New answers that one attempt may buy: the second, with a complaint, cures what can be cured. An attempt that carries
/// on for a lost one shares its number.
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
    let mut complaint = String::new();
    for n in 1..=ANSWERS_PER_ATTEMPT.saturating_mul(ctx.info().counted) {
        let key = if n == 1 { key.to_owned() } else { format!("{key}-{n}") };
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
