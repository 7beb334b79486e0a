//! Fits a prompt into a window: the oldest outputs of tools are shortened first, what the user and the rules say never.

use super::{Message, Request};
use crate::provider::estimate::{BYTES_PER_TOKEN_WORST, request_bytes, request_tokens_max};

/// What is left of a shortened output at each end, in bytes: the command and the verdict usually stand there.
const KEPT_BYTES: usize = 400;
/// Part of a window that is not planned with, as its divisor: templates and role markers cost tokens too.
const MARGIN_DIVISOR: u64 = 50;

/// The request as it may be sent to a model whose window is `context_tokens`, or `None` when even shortened outputs
/// do not make it fit beside `output_tokens`.
#[must_use]
pub fn fit(request: &Request, context_tokens: u64, output_tokens: u32) -> Option<Request> {
    let usable = context_tokens.saturating_sub(context_tokens / MARGIN_DIVISOR);
    let room = usable.checked_sub(u64::from(output_tokens)).filter(|room| *room > 0)?;
    if request_tokens_max(request) <= room {
        return Some(request.clone());
    }
    let room_bytes = usize::try_from(room).unwrap_or(usize::MAX).saturating_mul(BYTES_PER_TOKEN_WORST);
    let mut shortened = request.clone();
    let mut bytes = request_bytes(request);
    for message in &mut shortened.messages {
        if bytes <= room_bytes {
            break;
        }
        if let Message::Tool { output, .. } = message {
            let shorter = shorten(output);
            bytes = bytes.saturating_sub(output.len().saturating_sub(shorter.len()));
            *output = shorter;
        }
    }
    (request_tokens_max(&shortened) <= room).then_some(shortened)
}

/// The beginning and the end of a long text.
fn shorten(text: &str) -> String {
    if text.len() <= 2 * KEPT_BYTES + 100 {
        return text.to_owned();
    }
    let head = floor_boundary(text, KEPT_BYTES);
    let tail = floor_boundary(text, text.len() - KEPT_BYTES);
    format!("{}\n[… {} bytes left out to save room …]\n{}", &text[..head], tail - head, &text[tail..])
}

/// The last character boundary at or before `at`.
fn floor_boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestrator::Role;

    fn request(outputs: &[usize]) -> Request {
        let mut messages = vec![Message::System { text: "rules".into() }, Message::User { text: "do it".into() }];
        for (n, size) in outputs.iter().enumerate() {
            messages.push(Message::Tool {
                call_id: n.to_string(),
                name: "read".into(),
                output: "\u{e4}".repeat(size / 2),
            });
        }
        Request {
            role: Role::Implementer,
            purpose: "test".into(),
            messages,
            tools: vec![],
            output_schema: None,
            max_output_tokens: 100,
        }
    }
    fn sizes(request: &Request) -> Vec<usize> {
        let sizes = request.messages.iter().map(|m| match m {
            Message::Tool { output, .. } => output.len(),
            _ => 0,
        });
        sizes.skip(2).collect()
    }

    #[test]
    fn the_oldest_outputs_are_shortened_first() {
        let original = request(&[6000, 6000, 6000]);
        assert_eq!(fit(&original, 100_000, 100), Some(original.clone()));
        let fitted = fit(&original, 5000, 100).unwrap();
        let sizes = sizes(&fitted);
        assert!(sizes[0] < 1000 && sizes[1..] == [6000, 6000], "{sizes:?}");
        assert!(request_tokens_max(&fitted) <= 5000);
    }

    #[test]
    fn what_cannot_fit_is_not_sent() {
        assert_eq!(fit(&request(&[6000]), 300, 100), None);
        assert_eq!(fit(&request(&[]), 100, 100), None);
        assert_eq!(fit(&request(&[]), 0, 0), None);
    }
}
