//! `gather@1`: one turn of the conversation that turns an idea into requirements.
//!
//! It hears the user's last answer, asks the architect, and either returns one question or says that it knows enough.
//! What was said is a row of `conversations`, what was understood a record of the project; both are written once.

use crate::{
    ask::ask,
    contract,
    fact::{Requirement, Requirements},
    implement::reserve,
    orchestrator::{Reply, Request, Role},
    record::{self, Kind, Speaker, TURN_BYTES_MAX},
    toolbox::Toolbox,
    tools::prompt,
};
use futures_util::future::BoxFuture;
use loopwright_engine::{
    Failure,
    activity::{Activity, Context},
    signature::Signature,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::Arc};
use uuid::Uuid;

/// What its calls are for, as routing and usage name it.
const PURPOSE: &str = "gather";
/// The prompt file, in the bundle of a definition.
pub const PROMPT: &str = "prompts/gather.hbs";
const SHIPPED_PROMPT: &str = include_str!("../../workflow-defs/prompts/gather.hbs");
/// After that many answers the architect decides what is still open: people leave interrogations.
const QUESTIONS_MAX: usize = 6;
/// Suggested answers to a question.
const SUGGESTIONS_MAX: usize = 4;
/// Most requirements; a larger idea is cut by the architect, who says so in an assumption.
const REQUIREMENTS_MAX: usize = 40;
const OUTPUT_TOKENS_MAX: u32 = 4096;
const RESERVED_INPUT_TOKENS: u64 = 6_000;

/// What `gather@1` is given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
pub struct Input {
    #[schemars(with = "String")]
    pub project_id: Uuid,
    pub idea: String,
    /// The user's answer to the last question; empty in the first round.
    #[serde(default)]
    pub answer: String,
}

/// What `gather@1` returns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Output {
    /// Nothing has to be asked any more.
    pub complete: bool,
    /// Empty when complete.
    pub question: String,
    /// Answers that the user may take as they are.
    pub suggestions: Vec<String>,
    pub requirements: Vec<Requirement>,
    /// What was decided without asking.
    pub assumptions: Vec<String>,
    pub model: String,
}

/// The activity.
pub struct Gather(Arc<Toolbox>);

impl Gather {
    #[must_use]
    pub fn new(toolbox: Arc<Toolbox>) -> Self {
        Self(toolbox)
    }
}

/// The contract.
#[must_use]
pub fn signature() -> Signature {
    contract::signature::<Input, Output>(
        "gather@1",
        "Asks the next question about an idea, or states its requirements",
        contract::MODEL_FAILURES,
    )
}

impl Activity for Gather {
    fn signature(&self) -> Signature {
        signature()
    }

    fn run(&self, ctx: Context, input: Value) -> BoxFuture<'static, Result<Value, Failure>> {
        let toolbox = self.0.clone();
        contract::run(ctx, input, move |ctx, input| async move { work(&toolbox, &ctx, input).await })
    }

    fn reserve(&self, _input: &Value, extras: &Value) -> Value {
        reserve(self.0.orchestrator.planned(
            (Role::Architect, PURPOSE),
            extras,
            1,
            RESERVED_INPUT_TOKENS,
            OUTPUT_TOKENS_MAX,
        ))
    }
}

async fn work(toolbox: &Toolbox, ctx: &Context, input: Input) -> Result<Output, Failure> {
    let (info, pool, project) = (ctx.info(), &toolbox.pool, input.project_id);
    let idea = prompt::middle_out(input.idea.trim(), TURN_BYTES_MAX);
    if idea.is_empty() {
        return Err(Failure::permanent("input.invalid", "the idea is empty; say what is to be built"));
    }
    record::say(pool, project, Speaker::User, &idea, &format!("idea:{}", info.run_id), info).await?;
    let answer = prompt::middle_out(input.answer.trim(), TURN_BYTES_MAX);
    if !answer.is_empty() {
        let key = format!("answer:{}", info.idempotency_key);
        record::say(pool, project, Speaker::User, &answer, &key, info).await?;
    }
    // An earlier run on the same project has asked questions of its own.
    let questions = format!("question:{}:", info.run_id);
    let own = format!("{questions}{}", info.idempotency_key);
    let said = record::conversation(pool, project, &own).await?;
    let asked = record::turns(pool, project, &questions, &own).await?;
    let before: Option<Requirements> = record::newest(pool, project, Kind::Requirements, info).await?;
    let data = json!({
        "conversation": said,
        "asked": asked,
        "may_ask": asked < QUESTIONS_MAX,
        "known": before.map(|known| prompt::readable(&json!(known.requirements), TURN_BYTES_MAX)).unwrap_or_default(),
    });
    let request = Request {
        role: Role::Architect,
        purpose: PURPOSE.to_owned(),
        messages: prompt::messages(ctx, PROMPT, SHIPPED_PROMPT, &data)?,
        tools: Vec::new(),
        output_schema: Some(schema()),
        max_output_tokens: OUTPUT_TOKENS_MAX,
    };
    let judge = |reply: &Reply| judge(reply.json.as_ref(), asked < QUESTIONS_MAX);
    let (answer, reply) = ask(&toolbox.orchestrator, ctx, "ask", request.into(), judge).await?;
    if !answer.complete {
        record::say(pool, project, Speaker::Model, &answer.question, &own, info).await?;
    }
    let understood =
        Requirements { idea, requirements: answer.requirements.clone(), assumptions: answer.assumptions.clone() };
    record::put(pool, project, Kind::Requirements, info, &understood).await?;
    Ok(Output {
        complete: answer.complete,
        question: answer.question,
        suggestions: answer.suggestions,
        requirements: answer.requirements,
        assumptions: answer.assumptions,
        model: reply.model,
    })
}

/// A model's answer, as asked for.
#[derive(Clone, Debug, Deserialize)]
struct Answer {
    complete: bool,
    #[serde(default)]
    question: String,
    #[serde(default)]
    suggestions: Vec<String>,
    requirements: Vec<Requirement>,
    #[serde(default)]
    assumptions: Vec<String>,
}

fn schema() -> Value {
    let texts = |most: usize| json!({"type": "array", "items": {"type": "string"}, "maxItems": most});
    json!({
        "type": "object",
        "properties": {
            "complete": {"type": "boolean"},
            "question": {"type": "string"},
            "suggestions": texts(SUGGESTIONS_MAX),
            "requirements": {"type": "array", "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "text": {"type": "string"}},
                "required": ["id", "text"]
            }},
            "assumptions": texts(20)
        },
        "required": ["complete", "question", "suggestions", "requirements", "assumptions"]
    })
}

/// Reads an answer. A question that comes when no more may be asked counts as complete.
fn judge(json: Option<&Value>, may_ask: bool) -> Result<Answer, String> {
    let mut answer = Answer::deserialize(json.unwrap_or(&Value::Null)).map_err(|e| e.to_string())?;
    answer.question = answer.question.trim().to_owned();
    if !answer.complete && !may_ask {
        answer.complete = true;
    }
    answer.requirements.retain(|requirement| !requirement.text.trim().is_empty());
    if answer.complete {
        answer.question.clear();
        answer.suggestions.clear();
        if answer.requirements.is_empty() {
            return Err("it is complete without a single requirement".to_owned());
        }
    } else if answer.question.is_empty() {
        return Err("it is not complete, and there is no question".to_owned());
    }
    if answer.requirements.len() > REQUIREMENTS_MAX {
        return Err(format!("{} requirements are too many; {REQUIREMENTS_MAX} are allowed", answer.requirements.len()));
    }
    answer.suggestions.retain(|text| !text.trim().is_empty());
    answer.suggestions.truncate(SUGGESTIONS_MAX);
    answer.assumptions.retain(|text| !text.trim().is_empty());
    let mut taken = BTreeSet::new();
    for requirement in &mut answer.requirements {
        // Ids are written into plans, checks and trailers: short and without spaces. Plans name them in any case.
        let id: String = requirement.id.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(20).collect();
        let new = !id.is_empty() && taken.insert(id.to_ascii_lowercase());
        requirement.id = if new { id } else { String::new() };
    }
    // Known ids stay; the rest gets what is free.
    for requirement in answer.requirements.iter_mut().filter(|requirement| requirement.id.is_empty()) {
        let free = (1u32..).map(|n| format!("R{n}")).find(|id| taken.insert(id.to_ascii_lowercase()));
        requirement.id = free.unwrap_or_default();
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_asks_one_question_or_states_requirements() {
        let answer = |value: Value, may_ask| judge(Some(&value), may_ask);
        let ask = json!({"complete": false, "question": " Which? ", "suggestions": ["a", " "], "requirements": [], "assumptions": []});
        let open = answer(ask.clone(), true).expect("a question");
        assert_eq!((open.question.as_str(), open.suggestions.len()), ("Which?", 1));
        assert!(answer(ask, false).expect_err("no more questions").contains("without a single requirement"));
        let done = json!({"complete": true, "question": "left over", "suggestions": ["x"],
            "requirements": [{"id": "R 1", "text": "a"}, {"id": "R1", "text": "b"}, {"id": "", "text": "c"}], "assumptions": ["z"]});
        let done = answer(done, true).expect("complete");
        assert!(done.question.is_empty() && done.suggestions.is_empty());
        assert_eq!(done.requirements.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["R1", "R2", "R3"]);
        let clash = json!({"complete": true, "requirements": [{"id": "", "text": "a"}, {"id": "R2", "text": "b"},
            {"id": "r2", "text": "c"}, {"id": "R1", "text": "d"}, {"id": "R9", "text": " "}]});
        let ids: Vec<String> = answer(clash, true).expect("complete").requirements.into_iter().map(|r| r.id).collect();
        assert_eq!(ids, ["R3", "R2", "R4", "R1"]);
        let blank = json!({"complete": true, "requirements": [{"id": "R1", "text": " "}]});
        assert!(answer(blank, true).expect_err("nothing").contains("without a single requirement"));
        let mute = json!({"complete": false, "question": "", "suggestions": [], "requirements": [], "assumptions": []});
        assert!(answer(mute, true).expect_err("nothing").contains("no question"));
        assert!(judge(None, true).is_err());
    }
}
