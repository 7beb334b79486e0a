//! The agent loop: a model, its tools, and an end that comes in every case.

use super::{
    Bench, CALLS_PER_TURN_MAX, HISTORY_BYTES_MAX, Rule, Tool,
    call::{self, Call},
    execute::{Answer, Hands},
    record::{End, ToolResult, TurnRecord},
    watch::{Verdict, Watch},
};
use crate::{
    contract,
    edit::Frozen,
    orchestrator::{Message, Opening, Orchestrator, Question, Reply, Request, Role, ToolCall},
};
use loopwright_engine::{Failure, FailureKind, activity::Context};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{future::Future, time::Duration};

/// Time between heartbeats while a model or a command works: well below the two minutes of a heartbeat timeout.
const PULSE: Duration = Duration::from_secs(15);
/// Outputs shorter than this stay when the conversation is shortened, in bytes.
const ELIDE_BYTES_MIN: usize = 512;
const ELIDED: &str = "[left out to save space; call the tool again if you need it]";
/// Most validation errors told to a model at once.
const ERRORS_MAX: usize = 5;

/// What the loop is for.
#[derive(Clone, Debug, PartialEq)]
pub enum Goal {
    /// The tree has to change; standing still is stopped.
    Change,
    /// An answer in words, or an object where a schema is given.
    Answer { schema: Option<Value> },
}

/// A model that works with tools until it is done, stopped, or out of turns.
pub struct AgentLoop {
    pub orchestrator: Orchestrator,
    pub role: Role,
    /// For routing and the usage row: `implement`, `agent`.
    pub purpose: String,
    pub tools: Vec<Tool>,
    pub goal: Goal,
    /// What the `edit` and `run` tools may not change.
    pub frozen: Frozen,
    pub turns_max: u32,
    /// Per turn.
    pub max_output_tokens: u32,
}

/// How a loop ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The model called `done`.
    Done,
    /// It answered in words.
    Text,
    /// The turns were used up, but files changed: the checks will tell what that is worth.
    Turns,
}

/// What a loop came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub ending: Ending,
    /// The model's own words.
    pub summary: String,
    /// The object that the goal's schema asked for.
    pub answer: Option<Value>,
    /// Turns taken, the last one included.
    pub turns: u32,
    /// Files that differ from the loop's start.
    pub changed: usize,
    /// Provider and model of the last turn.
    pub provider: String,
    pub model: String,
}

/// The checkpoint `stopped:<n>`: a stretch of turns that a rule ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stop {
    role: Role,
    /// The last turn's number.
    turn: u32,
    rule: Rule,
}

impl AgentLoop {
    /// Works until the end. `opening` makes the first messages; it is asked once per step, not per attempt.
    ///
    /// # Shape
    /// Checkpoints of the step: `opening:<n>`, `call:turn-<n>` (by the orchestrator), `turn:<n>`, `stopped:<n>`. A
    /// step that was stopped starts afresh, with turn numbers going on, only for another role: that is what an
    /// escalation changes. For the same role the recorded stop is returned again.
    /// # Errors
    /// `model.no_progress`, retryable (another role may get further, see above), with the rule in `detail`; the orchestrator's; `cancelled` between two steps;
    /// those of the bench and of the store.
    pub async fn run<F, W>(&self, ctx: &Context, bench: &dyn Bench, opening: F) -> Result<Outcome, Failure>
    where
        F: FnOnce() -> W,
        W: Future<Output = Result<Opening, Failure>>,
    {
        let stops = self.stops(ctx).await?;
        if let Some(last) = stops.last().filter(|stop| stop.role == self.role) {
            return Err(self.no_progress(last));
        }
        let first = stops.last().map_or(1, |stop| stop.turn + 1);
        let Opening { mut messages, smaller } = self.opening(ctx, &stops, opening).await?;
        let mut state =
            State { hands: Hands::new(bench, &self.frozen), watch: Watch::default(), nudged: false, doubted: false };

        let mut served = (String::new(), String::new());
        for turn in 1..=self.turns_max {
            let number = first + turn - 1;
            ctx.check_cancelled()?;
            let progress = self.progress(turn, "model", "", &state);
            let reply = alive(ctx, progress, self.ask(ctx, &format!("turn-{number}"), &messages, &smaller)).await?;
            served = (reply.provider.clone(), reply.model.clone());

            let key = format!("turn:{number}");
            let record = match ctx.checkpoint(&key).await? {
                Some(saved) => {
                    let record: TurnRecord = read(saved, &key)?;
                    state.replay(self.meant(&reply), &reply, &record)?;
                    record
                }
                None => {
                    let record = self.act(ctx, &mut state, &reply, turn).await?;
                    ctx.save(&key, &contract::render(&record)?).await?;
                    record
                }
            };
            extend(&mut messages, &reply, &record);

            let outcome = |ending, summary, answer, state: &State<'_>| Outcome {
                ending,
                summary,
                answer,
                turns: turn,
                changed: state.hands.tree.changed(),
                provider: served.0.clone(),
                model: served.1.clone(),
            };
            match record.end {
                None => {}
                Some(End::Done { summary, result }) => return Ok(outcome(Ending::Done, summary, result, &state)),
                Some(End::Text { text }) => return Ok(outcome(Ending::Text, text, None, &state)),
                Some(End::Stopped { rule }) => {
                    return Err(self.stop(ctx, stops.len(), Stop { role: self.role, turn: number, rule }).await);
                }
            }
        }
        let changed = state.hands.tree.changed();
        if self.goal == Goal::Change && changed > 0 {
            let summary = format!("All {} turns were used before the model said that it was done.", self.turns_max);
            let (provider, model) = served;
            return Ok(Outcome {
                ending: Ending::Turns,
                summary,
                answer: None,
                turns: self.turns_max,
                changed,
                provider,
                model,
            });
        }
        let stop = Stop {
            role: self.role,
            turn: first + self.turns_max.saturating_sub(1),
            rule: Rule::Turns { turns: self.turns_max },
        };
        Err(self.stop(ctx, stops.len(), stop).await)
    }

    /// The stops that earlier attempts of the step recorded, oldest first.
    async fn stops(&self, ctx: &Context) -> Result<Vec<Stop>, Failure> {
        let mut stops = Vec::new();
        loop {
            let key = format!("stopped:{}", stops.len());
            match ctx.checkpoint(&key).await? {
                Some(saved) => stops.push(read::<Stop>(saved, &key)?),
                None => return Ok(stops),
            }
        }
    }

    async fn stop(&self, ctx: &Context, index: usize, stop: Stop) -> Failure {
        let saved = async { ctx.save(&format!("stopped:{index}"), &contract::render(&stop)?).await };
        match saved.await {
            Ok(()) => self.no_progress(&stop),
            Err(failure) => failure,
        }
    }

    fn no_progress(&self, stop: &Stop) -> Failure {
        Failure::retryable("model.no_progress", format!("The work was stopped: {}.", stop.rule)).with_detail(json!({
            "stop": stop.rule,
            "turn": stop.turn,
            "turns_max": self.turns_max,
        }))
    }

    async fn opening<F, W>(&self, ctx: &Context, stops: &[Stop], make: F) -> Result<Opening, Failure>
    where
        F: FnOnce() -> W,
        W: Future<Output = Result<Opening, Failure>>,
    {
        let key = format!("opening:{}", stops.len());
        if let Some(saved) = ctx.checkpoint(&key).await? {
            return match saved {
                // As an earlier release left it.
                Value::Array(_) => read::<Vec<Message>>(saved, &key).map(Opening::from),
                saved => read(saved, &key),
            };
        }
        let mut opening = make().await?;
        opening.each(|messages| {
            if let Some(stop) = stops.last() {
                let text = format!(
                    "Another model worked on this before you and was stopped: {}. Its changes are gone. Take another way.",
                    stop.rule
                );
                messages.push(Message::User { text });
            }
            for message in messages {
                if let Message::System { text } | Message::User { text } = message {
                    *text = printable(text);
                }
            }
        });
        ctx.save(&key, &contract::render(&opening)?).await?;
        Ok(opening)
    }

    /// One model call; without tools where no candidate takes part with them.
    async fn ask(
        &self,
        ctx: &Context,
        key: &str,
        messages: &[Message],
        smaller: &[Vec<Message>],
    ) -> Result<Reply, Failure> {
        let mut question = Question { request: self.request(messages), smaller: smaller.to_vec() };
        match self.orchestrator.call(ctx, key, question.clone()).await {
            Err(failure)
                if matches!(failure.code.as_str(), "model.unavailable" | "model.no_own_key")
                    && failure.kind == FailureKind::Permanent
                    && !question.request.tools.is_empty() =>
            {
                question.request.tools.clear();
                self.orchestrator.call(ctx, key, question).await
            }
            result => result,
        }
    }

    fn request(&self, messages: &[Message]) -> Request {
        Request {
            role: self.role,
            purpose: self.purpose.clone(),
            messages: messages.to_vec(),
            tools: self.tools.iter().map(|tool| tool.spec(&self.goal)).collect(),
            output_schema: None,
            max_output_tokens: self.max_output_tokens,
        }
    }

    fn progress(&self, turn: u32, tool: &str, subject: &str, state: &State<'_>) -> Value {
        let mut progress = json!({
            "turn": turn,
            "turns_max": self.turns_max,
            "tool": tool,
            "changed_files": state.hands.tree.changed(),
        });
        if !subject.is_empty() {
            progress["path"] = subject.chars().take(120).collect::<String>().into();
        }
        progress
    }

    /// Executes what a reply asks for.
    async fn act(&self, ctx: &Context, state: &mut State<'_>, reply: &Reply, turn: u32) -> Result<TurnRecord, Failure> {
        let mut record = TurnRecord::default();
        reply.model_label().clone_into(&mut state.hands.model);
        if reply.tool_calls.is_empty() {
            self.act_on_text(ctx, state, reply, turn, &mut record).await?;
        }
        let mut refused_edit = false;
        for (index, tool_call) in reply.tool_calls.iter().enumerate() {
            ctx.check_cancelled()?;
            let tree = state.hands.tree.state();
            let verdict = state.watch.call(&tool_call.name, &signature(tool_call), &tree);
            let output = if let Verdict::Stop(rule) = &verdict {
                record.end = Some(End::Stopped { rule: rule.clone() });
                "stopped".to_owned()
            } else if index >= CALLS_PER_TURN_MAX {
                Answer::refused(format!("at most {CALLS_PER_TURN_MAX} calls in one turn.")).text
            } else {
                match call::parse(tool_call, &self.tools) {
                    Err(why) => {
                        refused_edit |= tool_call.name == Tool::Edit.name();
                        Answer::refused(why).text
                    }
                    Ok(Call::Done { summary, result }) => self.done(state, refused_edit, summary, result, &mut record),
                    Ok(call) => {
                        let progress = self.progress(turn, &tool_call.name, call.subject(), state);
                        let answer = alive(ctx, progress, state.hands.execute(ctx, &call)).await?;
                        refused_edit |= matches!(call, Call::Edit { .. }) && !answer.ok;
                        answer.text
                    }
                }
            };
            let output = match verdict {
                Verdict::Warn(warning) => format!("{output}\n\n[{warning}]"),
                Verdict::Fine | Verdict::Stop(_) => output,
            };
            record.results.push(ToolResult {
                state: tree,
                call_id: tool_call.id.clone(),
                name: tool_call.name.clone(),
                output: printable(&output),
            });
            if record.end.is_some() {
                break;
            }
        }
        (record.delta, record.refused) = state.hands.end_turn();
        let verdict = state.watch.turn(!record.delta.is_empty());
        if self.goal == Goal::Change && record.end.is_none() {
            match verdict {
                Verdict::Stop(rule) => record.end = Some(End::Stopped { rule }),
                Verdict::Warn(warning) => match record.results.last_mut() {
                    Some(last) => last.output.push_str(&format!("\n\n[{warning}]")),
                    None => record.note = Some(format!("{}\n\n[{warning}]", record.note.unwrap_or_default())),
                },
                Verdict::Fine => {}
            }
        }
        state.nudged |= record.reminded;
        state.doubted |= record.doubted;
        Ok(record)
    }

    /// The call that a reply in words stands for: edits, or `done` with the object that was asked for.
    fn meant(&self, reply: &Reply) -> Option<ToolCall> {
        if !reply.tool_calls.is_empty() {
            return None;
        }
        let as_call = |tool: Tool, arguments| ToolCall { id: String::new(), name: tool.name().to_owned(), arguments };
        if self.tools.contains(&Tool::Edit)
            && let Some(answer) = call::text_answer(&reply.text)
        {
            return Some(as_call(Tool::Edit, answer.value));
        }
        match &self.goal {
            Goal::Answer { schema: Some(_) } => {
                call::json_object(&reply.text).map(|result| as_call(Tool::Done, json!({ "result": result })))
            }
            Goal::Answer { schema: None } | Goal::Change => None,
        }
    }

    /// A reply without tool calls: edits as plain text, an answer, or words where work was asked for.
    async fn act_on_text(
        &self,
        ctx: &Context,
        state: &mut State<'_>,
        reply: &Reply,
        turn: u32,
        record: &mut TurnRecord,
    ) -> Result<(), Failure> {
        let warning = match self.meant(reply).map(|call| state.watched(&call)) {
            Some(Verdict::Stop(rule)) => {
                record.end = Some(End::Stopped { rule });
                return Ok(());
            }
            Some(Verdict::Warn(warning)) => format!("\n\n[{warning}]"),
            Some(Verdict::Fine) | None => String::new(),
        };
        if self.tools.contains(&Tool::Edit)
            && let Some(answer) = call::text_answer(&reply.text)
        {
            let applied = match call::edits(&answer.value) {
                Err(why) => Answer::refused(why),
                // Nothing more to change is how a model without tools says that it is done.
                Ok(edits) if edits.is_empty() => {
                    let text = self.done(state, false, answer.done.unwrap_or_default(), None, record);
                    record.note = Some(text);
                    return Ok(());
                }
                Ok(edits) => {
                    let call = Call::Edit { edits };
                    let progress = self.progress(turn, Tool::Edit.name(), call.subject(), state);
                    alive(ctx, progress, state.hands.execute(ctx, &call)).await?
                }
            };
            if let (true, Some(summary)) = (applied.ok, answer.done) {
                record.end = Some(End::Done { summary, result: None });
            }
            record.note = Some(printable(&format!("Result of your edits: {}{warning}", applied.text)));
            return Ok(());
        }

        let text = reply.text.trim();
        match &self.goal {
            Goal::Answer { schema: None } if !text.is_empty() => {
                record.end = Some(End::Text { text: printable(text) });
            }
            Goal::Answer { schema: Some(_) } if call::json_object(text).is_some() => {
                let note = self.done(state, false, String::new(), call::json_object(text), record);
                record.note = Some(format!("{note}{warning}"));
            }
            Goal::Change if state.nudged && state.hands.tree.changed() > 0 => {
                record.end = Some(End::Text { text: printable(text) });
            }
            _ if state.nudged => record.end = Some(End::Stopped { rule: Rule::NoCalls }),
            goal => {
                record.reminded = true;
                let remedy = match goal {
                    Goal::Change => {
                        "Use the tools to do the work, and call `done` when it is finished. If you cannot call tools, \
                         answer with one JSON object {\"edits\": [{\"op\": \"write\", \"path\": \"…\", \"content\": \"…\"}]} and \
                         with {\"edits\": []} when you are finished."
                    }
                    Goal::Answer { schema: Some(_) } => "Call `done` with the result.",
                    Goal::Answer { schema: None } => "The answer was empty. Answer the question.",
                };
                record.note = Some(remedy.to_owned());
            }
        }
        Ok(())
    }

    /// Takes or refuses a `done`.
    fn done(
        &self,
        state: &State<'_>,
        refused_edit: bool,
        summary: String,
        result: Option<Value>,
        record: &mut TurnRecord,
    ) -> String {
        match &self.goal {
            Goal::Change if refused_edit => {
                return Answer::refused("not done: an edit of this turn was refused. Correct it first.").text;
            }
            Goal::Change if state.hands.tree.changed() == 0 && !state.doubted => {
                record.doubted = true;
                return Answer::refused(
                    "nothing has changed yet. If the item is already satisfied as it is, call `done` again and say why.",
                )
                .text;
            }
            Goal::Answer { schema: Some(schema) } => {
                let Some(result) = &result else {
                    return Answer::refused("`result` is missing.").text;
                };
                if let Err(why) = valid(schema, result) {
                    return Answer::refused(format!("`result` does not fit its schema:\n{why}")).text;
                }
            }
            Goal::Answer { schema: None } if summary.trim().is_empty() => {
                return Answer::refused("`summary` is missing: it is the answer.").text;
            }
            Goal::Change | Goal::Answer { schema: None } => {}
        }
        record.end = Some(End::Done { summary: printable(&summary), result });
        "ok".to_owned()
    }
}

/// What a loop remembers from turn to turn; all of it follows from replies and records.
struct State<'b> {
    hands: Hands<'b>,
    watch: Watch,
    nudged: bool,
    doubted: bool,
}

impl State<'_> {
    /// What a call that came in words means for the loop.
    fn watched(&mut self, call: &ToolCall) -> Verdict {
        self.watch.call(&call.name, &signature(call), &self.hands.tree.state())
    }

    /// Brings the state to where a finished turn left it, without a model or a command. `meant`: what the reply stands for if it
    /// came in words.
    fn replay(&mut self, meant: Option<ToolCall>, reply: &Reply, record: &TurnRecord) -> Result<(), Failure> {
        for (call, result) in reply.tool_calls.iter().zip(&record.results) {
            self.watch.call(&call.name, &signature(call), &result.state);
        }
        if let Some(call) = meant {
            self.watched(&call);
        }
        self.hands.replay(&record.delta, &record.refused)?;
        self.watch.turn(!record.delta.is_empty());
        self.nudged |= record.reminded;
        self.doubted |= record.doubted;
        Ok(())
    }
}

/// Adds a turn to the conversation, and shortens its oldest outputs when it has grown too long.
fn extend(messages: &mut Vec<Message>, reply: &Reply, record: &TurnRecord) {
    let old = messages.len();
    messages.push(reply.to_message());
    for result in &record.results {
        messages.push(Message::Tool {
            call_id: result.call_id.clone(),
            name: result.name.clone(),
            output: result.output.clone(),
        });
    }
    if let Some(note) = &record.note {
        messages.push(Message::User { text: note.clone() });
    }
    let mut size: usize = messages.iter().map(weight).sum();
    if size <= HISTORY_BYTES_MAX {
        return;
    }
    // Down to half, so that the prefix then stays stable for many turns and providers can cache it.
    for message in &mut messages[..old] {
        if size <= HISTORY_BYTES_MAX / 2 {
            break;
        }
        if let Message::Tool { output, .. } = message
            && output.len() >= ELIDE_BYTES_MIN
        {
            size = size - output.len() + ELIDED.len();
            ELIDED.clone_into(output);
        }
    }
}

fn weight(message: &Message) -> usize {
    match message {
        Message::System { text } | Message::User { text } => text.len(),
        Message::Model { text, tool_calls, .. } => {
            text.len() + tool_calls.iter().map(|call| call.arguments.to_string().len()).sum::<usize>()
        }
        Message::Tool { output, .. } => output.len(),
    }
}

/// A call's name and arguments, whatever order their fields were given in: a replayed call is the one that was made.
fn signature(call: &ToolCall) -> String {
    let mut arguments = call.arguments.clone();
    arguments.sort_all_objects();
    format!("{} {arguments}", call.name)
}

/// NUL cannot be stored and says nothing to a model; its picture can.
fn printable(text: &str) -> String {
    text.replace('\0', "\u{2400}")
}

fn read<T: serde::de::DeserializeOwned>(saved: Value, key: &str) -> Result<T, Failure> {
    serde_json::from_value(saved)
        .map_err(|error| Failure::permanent("internal.checkpoint", format!("checkpoint {key} cannot be read: {error}")))
}

fn valid(schema: &Value, value: &Value) -> Result<(), String> {
    let validator = jsonschema::validator_for(schema).map_err(|error| format!("the schema is not usable: {error}"))?;
    let errors: Vec<_> = validator
        .iter_errors(value)
        .take(ERRORS_MAX)
        .map(|error| format!("- {}: {error}", error.instance_path()))
        .collect();
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

/// Waits for work and says at intervals that the attempt is alive.
async fn alive<T>(ctx: &Context, progress: Value, work: impl Future<Output = T>) -> T {
    ctx.heartbeat(progress.clone());
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = tokio::time::sleep(PULSE) => ctx.heartbeat(progress.clone()),
        }
    }
}
