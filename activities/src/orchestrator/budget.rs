//! Fits a question into a window by packing less of it.
//!
//! In this order, as far as it takes: outputs of tools in earlier turns are shortened, oldest first · smaller packings of the
//! opening · the newest turn's outputs are cut · the oldest turns are left out · the newest outputs are shortened. What the
//! system says, what the opening keeps in its smallest packing, and the model's last words stay. The model is told in place.
//!
//! The same question and window give the same bytes. What is given up is rounded up to parts of the window, so that the
//! prompts of a growing conversation keep their prefix for several turns.

use super::{Message, Question, Request};
use crate::provider::estimate::{BYTES_PER_TOKEN_WORST, message_bytes, request_bytes};

/// What is left of a shortened output at each end, in bytes: the command and the verdict usually stand there.
const KEPT_BYTES: usize = 400;
/// What is left of a cut output of the newest turn at each end, in bytes: enough to work with.
const NEWEST_KEPT_BYTES: usize = 4 << 10;
/// Part of a window that is not planned with, as its divisor: templates and role markers cost tokens too.
const MARGIN_DIVISOR: u64 = 50;
/// What is given up of a history is a multiple of this part of the room, as its divisor. Chosen: a provider then finds its
/// prefix again for some turns, and at most a quarter is given up too early.
const STEP_DIVISOR: usize = 4;
/// Room for the word about turns that are left out, in bytes.
const NOTE_BYTES: usize = 256;

/// The request as it may be sent to a model whose window is `context_tokens`, or `None` when even the smallest packing does
/// not fit beside `output_tokens`.
#[must_use]
pub fn fit(question: &Question, context_tokens: u64, output_tokens: u32) -> Option<Request> {
    let usable = context_tokens.saturating_sub(context_tokens / MARGIN_DIVISOR);
    let tokens = usable.checked_sub(u64::from(output_tokens)).filter(|room| *room > 0)?;
    let room = Room { bytes: usize::try_from(tokens).unwrap_or(usize::MAX).saturating_mul(BYTES_PER_TOKEN_WORST) };
    let mut request = question.request.clone();
    if room.holds(&request) {
        return Some(request);
    }
    let newest = request.messages.iter().rposition(is_model).unwrap_or(request.messages.len());
    let packings = std::iter::once(None).chain(question.smaller.iter().map(Some));
    for opening in packings {
        request = question.request.clone();
        if let Some(opening) = opening {
            drop(request.messages.splice(..opening.len().min(request.messages.len()), opening.iter().cloned()));
        }
        let target = room.to_free(&request);
        shorten_all(&mut request.messages[..newest], target, KEPT_BYTES);
        if room.holds(&request) {
            return Some(request);
        }
    }
    shorten_all(&mut request.messages[newest..], usize::MAX, NEWEST_KEPT_BYTES);
    if !room.holds(&request) {
        let target = room.to_free(&request) + NOTE_BYTES;
        leave_out(&mut request.messages, target);
    }
    if !room.holds(&request) {
        let newest = request.messages.iter().rposition(is_model).unwrap_or(0);
        shorten_all(&mut request.messages[newest..], usize::MAX, KEPT_BYTES);
    }
    room.holds(&request).then_some(request)
}

/// The smallest window in which [`fit`] leaves a prompt so many tokens beside an answer.
#[must_use]
pub fn window_for(prompt_tokens: u64, output_tokens: u64) -> u64 {
    prompt_tokens.saturating_add(output_tokens).saturating_mul(MARGIN_DIVISOR) / (MARGIN_DIVISOR - 1)
}

/// What a prompt may take.
struct Room {
    bytes: usize,
}

impl Room {
    fn holds(&self, request: &Request) -> bool {
        request_bytes(request) <= self.bytes
    }

    /// Bytes that have to go, rounded up to a multiple of the step.
    fn to_free(&self, request: &Request) -> usize {
        let step = (self.bytes / STEP_DIVISOR).max(1);
        request_bytes(request).saturating_sub(self.bytes).div_ceil(step).saturating_mul(step)
    }
}

fn is_model(message: &Message) -> bool {
    matches!(message, Message::Model { .. })
}

/// Shortens outputs of tools, oldest first, until `target` bytes are freed.
fn shorten_all(messages: &mut [Message], target: usize, kept: usize) {
    let mut freed = 0;
    for message in messages {
        if freed >= target {
            return;
        }
        if let Message::Tool { output, .. } = message {
            let shorter = shorten(output, kept);
            freed += output.len().saturating_sub(shorter.len());
            *output = shorter;
        }
    }
}

/// Takes whole turns out of the history, oldest first, until `target` bytes are freed; the last one stays.
fn leave_out(messages: &mut Vec<Message>, target: usize) {
    let turns: Vec<usize> = (0..messages.len()).filter(|at| is_model(&messages[*at])).collect();
    let (Some(first), Some(last)) = (turns.first().copied(), turns.last().copied()) else { return };
    let mut freed = 0;
    let (mut until, mut count) = (first, 0);
    for start in turns.into_iter().skip(1).chain([messages.len()]) {
        if freed >= target || until == last {
            break;
        }
        freed += messages[until..start].iter().map(message_bytes).sum::<usize>();
        (until, count) = (start, count + 1);
    }
    if count == 0 {
        return;
    }
    messages.drain(first..until);
    let note = format!(
        "[… {count} earlier turns of this conversation are left out to save room. What they changed is in the files: look \
         there before you do something again. …]"
    );
    match first.checked_sub(1).and_then(|at| messages.get_mut(at)) {
        Some(Message::User { text }) => {
            text.push_str("\n\n");
            text.push_str(&note);
        }
        _ => messages.insert(first, Message::User { text: note }),
    }
}

/// The beginning and the end of a long text.
fn shorten(text: &str, kept: usize) -> String {
    if text.len() <= 2 * kept + 100 {
        return text.to_owned();
    }
    let head = floor_boundary(text, kept);
    let tail = floor_boundary(text, text.len() - kept);
    format!("{}\n[… {} bytes left out to save room …]\n{}", &text[..head], tail - head, &text[tail..])
}

/// The last character boundary at or before `at`.
fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{orchestrator::Role, provider::estimate::request_tokens_max};
    use serde_json::Value;

    fn user(text: &str) -> Message {
        Message::User { text: text.into() }
    }
    fn model(text: &str) -> Message {
        Message::Model { text: text.into(), tool_calls: vec![], parts: Value::Null, provider: String::new() }
    }
    fn output(n: usize, bytes: usize) -> Message {
        Message::Tool { call_id: n.to_string(), name: "read".into(), output: "\u{e4}".repeat(bytes / 2) }
    }
    fn question(messages: Vec<Message>) -> Question {
        let mut all = vec![Message::System { text: "rules".into() }];
        all.extend(messages);
        Question::from(Request {
            role: Role::Implementer,
            purpose: "test".into(),
            messages: all,
            tools: vec![],
            output_schema: None,
            max_output_tokens: 100,
        })
    }
    fn outputs(sizes: &[usize]) -> Question {
        let outputs = sizes.iter().enumerate().map(|(n, size)| output(n, *size));
        question(std::iter::once(user("do it")).chain(outputs).collect())
    }
    /// An opening of `bytes` with smaller packings of the given sizes, and turns that read `sizes`.
    fn conversation(bytes: usize, smaller: &[usize], sizes: &[usize]) -> Question {
        let opening = |bytes: usize| user(&format!("do it {}", "c".repeat(bytes)));
        let turns = sizes.iter().enumerate().flat_map(|(n, size)| [model(&format!("turn {n}")), output(n, *size)]);
        let mut question = question(std::iter::once(opening(bytes)).chain(turns).collect());
        let system = question.request.messages[0].clone();
        question.smaller = smaller.iter().map(|bytes| vec![system.clone(), opening(*bytes)]).collect();
        question
    }
    fn sizes(request: &Request) -> Vec<usize> {
        let sizes = request.messages.iter().filter_map(|m| match m {
            Message::Tool { output, .. } => Some(output.len()),
            _ => None,
        });
        sizes.collect()
    }
    fn opening(request: &Request) -> &str {
        match &request.messages[1] {
            Message::User { text } => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_oldest_outputs_are_shortened_first() {
        let original = outputs(&[6000, 6000, 6000]);
        assert_eq!(fit(&original, 100_000, 100), Some(original.request.clone()));
        let fitted = fit(&original, 5300, 100).unwrap();
        let sizes = sizes(&fitted);
        assert!(sizes[0] < 1000 && sizes[1..] == [6000, 6000], "{sizes:?}");
        assert!(request_tokens_max(&fitted) <= 5300);
    }

    #[test]
    fn what_cannot_fit_is_not_sent() {
        assert_eq!(fit(&outputs(&[6000]), 300, 100), None);
        assert_eq!(fit(&outputs(&[]), 100, 100), None);
        assert_eq!(fit(&outputs(&[]), 0, 0), None);
        assert_eq!(fit(&conversation(9000, &[8000, 7000], &[]), 2000, 100), None);
    }

    #[test]
    fn an_opening_is_packed_smaller_only_as_far_as_it_takes() {
        let question = conversation(12_000, &[9_000, 6_000, 1_000], &[]);
        for (window, expected) in [(6_000, 12_000), (3_600, 9_000), (2_600, 6_000), (1_000, 1_000)] {
            let fitted = fit(&question, window, 100).unwrap();
            assert_eq!(opening(&fitted).len(), "do it ".len() + expected, "{window}");
            assert_eq!(fitted.messages[0], question.request.messages[0]);
            assert!(request_tokens_max(&fitted) + 100 <= window);
        }
    }

    #[test]
    fn old_outputs_go_before_the_opening_and_the_newest_last() {
        let question = conversation(6_000, &[1_000], &[6_000, 6_000]);
        let fitted = fit(&question, 5_000, 100).unwrap();
        assert!(opening(&fitted).len() > 6_000 && sizes(&fitted)[0] < 1_000 && sizes(&fitted)[1] == 6_000);
        let fitted = fit(&question, 3_200, 100).unwrap();
        assert!(opening(&fitted).len() < 2_000 && sizes(&fitted)[0] < 1_000 && sizes(&fitted)[1] == 6_000);
        let large = conversation(6_000, &[1_000], &[6_000, 30_000]);
        let fitted = fit(&large, 5_000, 100).unwrap();
        assert!(sizes(&fitted)[1] > 8_000 && sizes(&fitted)[1] < 9_000, "{:?}", sizes(&fitted));
    }

    #[test]
    fn the_oldest_turns_are_left_out_and_that_is_said() {
        let turns: Vec<Message> =
            (0..10).flat_map(|n| [model(&format!("{n}{}", "w".repeat(1_000))), output(n, 200)]).collect();
        let question = question(std::iter::once(user("do it")).chain(turns).collect());
        let fitted = fit(&question, 2_000, 100).unwrap();
        let Some(Message::Model { text: first, .. }) = fitted.messages.iter().find(|m| is_model(m)) else { panic!() };
        assert!(first.starts_with(|c: char| c > '0') && opening(&fitted).starts_with("do it\n\n[… "), "{first}");
        assert_eq!(fitted.messages[fitted.messages.len() - 2..], question.request.messages[20..]);
        // A turn goes with its outputs.
        assert!(is_model(&fitted.messages[2]) && fitted.messages.len().is_multiple_of(2));
    }

    #[test]
    fn a_growing_conversation_keeps_its_prefix_for_several_turns() {
        let all = [3_000; 24];
        let prompts: Vec<Request> =
            (1..=all.len()).map(|n| fit(&conversation(3_000, &[], &all[..n]), 12_000, 100).unwrap()).collect();
        // The newest turn's own outputs may be shortened a turn later.
        let kept = prompts.windows(2).filter(|pair| pair[1].messages.starts_with(&pair[0].messages)).count();
        assert!(kept * 3 >= all.len() * 2, "{kept} of {}", all.len() - 1);
    }
}
