//! What an activity asks, with what it may be asked with instead where a window is too small.

use super::{Message, Request};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The first messages of a conversation, and smaller packings of them.
///
/// # Shape
/// `smaller` goes from large to small; each says the same as `messages`, in as many messages, with parts cut or left out and a
/// word about it in their place. Rules, requirements, checks and the user's words are in all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Opening {
    pub messages: Vec<Message>,
    #[serde(default)]
    pub smaller: Vec<Vec<Message>>,
}

impl Opening {
    /// The same change to every packing.
    pub fn each(&mut self, mut change: impl FnMut(&mut Vec<Message>)) {
        std::iter::once(&mut self.messages).chain(&mut self.smaller).for_each(&mut change);
    }
}

impl From<Vec<Message>> for Opening {
    fn from(messages: Vec<Message>) -> Self {
        Self { messages, smaller: Vec::new() }
    }
}

/// A request whose first messages may be replaced by smaller packings.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    pub request: Request,
    /// As in [`Opening::smaller`]; each replaces as many messages as it has.
    pub smaller: Vec<Vec<Message>>,
}

impl From<Request> for Question {
    fn from(request: Request) -> Self {
        Self { request, smaller: Vec::new() }
    }
}

impl Question {
    /// `request` with `opening` in front of its messages.
    #[must_use]
    pub fn opened(opening: Opening, mut request: Request) -> Self {
        let rest = std::mem::replace(&mut request.messages, opening.messages);
        request.messages.extend(rest);
        Self { request, smaller: opening.smaller }
    }

    /// The same question with the fields of every JSON object in one order. What was recorded comes back from the store with
    /// its fields in another order than a provider or a definition wrote them, and a prompt whose bytes depend on which attempt
    /// asks is no prefix that a provider can cache.
    #[must_use]
    pub(super) fn in_order(mut self) -> Self {
        let request = &mut self.request;
        for message in &mut request.messages {
            if let Message::Model { tool_calls, parts, .. } = message {
                parts.sort_all_objects();
                tool_calls.iter_mut().for_each(|call| call.arguments.sort_all_objects());
            }
        }
        request.tools.iter_mut().for_each(|tool| tool.parameters.sort_all_objects());
        request.output_schema.iter_mut().for_each(Value::sort_all_objects);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestrator::{Role, ToolCall, ToolSpec};

    fn request(object: &str) -> Request {
        let value: Value = serde_json::from_str(object).unwrap();
        let tool_calls = vec![ToolCall { id: "1".into(), name: "f".into(), arguments: value.clone() }];
        Request {
            role: Role::Utility,
            purpose: "test".into(),
            messages: vec![Message::Model {
                text: String::new(),
                tool_calls,
                parts: value.clone(),
                provider: "gemini".into(),
            }],
            tools: vec![ToolSpec { name: "f".into(), description: String::new(), parameters: value.clone() }],
            output_schema: Some(value),
            max_output_tokens: 1,
        }
    }

    #[test]
    fn the_order_of_fields_does_not_reach_the_bytes() {
        // As a provider wrote it, and as Postgres gives it back: shorter names first.
        let texts = [r#"{"longer": [{"b": 1, "aa": 2}], "a": {}}"#, r#"{"a": {}, "longer": [{"b": 1, "aa": 2}]}"#];
        let bytes = texts.map(|text| serde_json::to_string(&Question::from(request(text)).in_order().request).unwrap());
        assert_eq!(bytes[0], bytes[1]);
        let other = r#"{"a": {}, "longer": [{"aa": 2, "b": 1}]}"#;
        let other = serde_json::to_string(&Question::from(request(other)).in_order().request).unwrap();
        assert_eq!(bytes[0], other);
    }

    #[test]
    fn a_conversation_goes_on_behind_its_opening() {
        let user = |text: &str| Message::User { text: text.into() };
        let mut opening = Opening { messages: vec![user("all")], smaller: vec![vec![user("less")]] };
        opening.each(|messages| messages.push(user("and")));
        let question = Question::opened(opening, Request { messages: vec![user("more")], ..request("{}") });
        assert_eq!(question.request.messages, [user("all"), user("and"), user("more")]);
        assert_eq!(question.smaller, [vec![user("less"), user("and")]]);
    }
}
