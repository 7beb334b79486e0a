//! From an update to what somebody wants: pure.

use crate::store::telegram::inbox::Arrived;
use serde_json::Value;
use teloxide::types::{Message, MessageKind, Update, UpdateKind, User};

/// An update that somebody sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    pub chat_id: i64,
    /// Telegram's id of the sender.
    pub from: i64,
    pub intent: Intent,
}

/// What the sender wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    Command(Command),
    /// An idea, an answer, a change.
    Text(String),
    /// A photo, a voice message: nothing that is read.
    Unreadable,
    /// The message held a key; the text is gone already.
    Secret {
        message_id: i32,
    },
    /// Not a private chat.
    Group,
    Button {
        query: String,
        message_id: Option<i32>,
        token: String,
    },
    PreCheckout {
        query: String,
        currency: String,
        amount: i64,
        payload: String,
    },
    Paid(Charge),
    Refunded {
        charge_id: String,
    },
}

/// Money that Telegram has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Charge {
    pub id: String,
    pub currency: String,
    pub amount: i64,
    pub payload: String,
    pub recurring: bool,
}

/// What an update tells of money that moved, as it came: also where the library cannot read it.
#[derive(Clone, Copy, Debug)]
pub struct Money<'a> {
    /// `successful_payment` or `refunded_payment`.
    pub kind: &'static str,
    pub body: &'a Value,
    message: &'a Value,
}

impl Money<'_> {
    /// Telegram's id of who paid, which is his private chat's as well.
    #[must_use]
    pub fn from(&self) -> Option<i64> {
        self.message["from"]["id"].as_i64()
    }
}

/// Finds money in an update. A message that is only replied to, or pinned, tells of nothing new.
#[must_use]
pub fn money(raw: &Value) -> Option<Money<'_>> {
    let messages = raw.as_object()?.values();
    let mut found = messages.flat_map(|message| MONEY.iter().map(move |kind| (*kind, message)));
    found.find_map(|(kind, message)| {
        message.get(kind).filter(|b| !b.is_null()).map(|body| Money { kind, body, message })
    })
}

const MONEY: [&str; 2] = ["successful_payment", "refunded_payment"];

/// A word after a slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Start,
    New(String),
    Projects,
    Status,
    Credits,
    Usage,
    /// Stars, if they were named.
    Buy(Option<i32>),
    /// Credits more for the run, as they were written.
    Limit(String),
    Download,
    Cancel,
    /// Whatever follows it: a key does not belong here.
    Key,
    Help,
    PaySupport,
    Terms,
    Unknown(String),
}

/// Every command with its description, for the menu and for /help.
pub const COMMANDS: &[(&str, &str)] = &[
    ("start", "what I do"),
    ("new", "start a project: /new and your idea"),
    ("projects", "your projects; choose one"),
    ("status", "how far the project is"),
    ("download", "the project as a zip file"),
    ("cancel", "stop the work on the project"),
    ("limit", "let the project spend more: /limit and credits"),
    ("credits", "your balance"),
    ("usage", "what your credits went into"),
    ("buy", "buy credits with Stars"),
    ("key", "how to use your own key of a model provider"),
    ("paysupport", "questions about a payment"),
    ("terms", "terms of use"),
    ("help", "this list"),
];

/// What of an update decides its place in the inbox; cuts secrets out. `None` for what has no id.
#[must_use]
pub fn arrived(mut raw: Value) -> Option<Arrived> {
    let update_id = raw["update_id"].as_i64()?;
    let redacted = crate::secret::clean(&mut raw);
    let chat = |update: &Value| update["chat"]["id"].as_i64();
    let chat_id = chat(&raw["message"])
        .or_else(|| chat(&raw["edited_message"]))
        .or_else(|| chat(&raw["callback_query"]["message"]))
        .or_else(|| raw["callback_query"]["from"]["id"].as_i64())
        .or_else(|| raw["pre_checkout_query"]["from"]["id"].as_i64());
    let urgent = raw["pre_checkout_query"].is_object();
    Some(Arrived { update_id, chat_id, urgent, raw, redacted })
}

/// Reads an update. `None` for what is nobody's wish: other kinds, other bots, edits.
#[must_use]
pub fn parse(raw: &Value, redacted: bool) -> Option<Incoming> {
    // As text: from a value the library reads every update as unknown, because it wants borrowed keys.
    let update: Update = serde_json::from_str(&raw.to_string()).ok()?;
    match update.kind {
        UpdateKind::Message(message) => {
            let from = person(message.from.as_ref()?)?;
            let intent = of_message(&message, redacted);
            // A forwarded invoice may be paid in a group; what comes of it is between him and us.
            let chat_id = if matches!(intent, Intent::Paid(_)) { from } else { message.chat.id.0 };
            Some(Incoming { chat_id, from, intent })
        }
        // Only a key makes an edit interesting: an answer counts as it was sent.
        UpdateKind::EditedMessage(message) if redacted && message.chat.is_private() => {
            let from = person(message.from.as_ref()?)?;
            let intent = Intent::Secret { message_id: message.id.0 };
            Some(Incoming { chat_id: message.chat.id.0, from, intent })
        }
        UpdateKind::CallbackQuery(query) => {
            let from = person(&query.from)?;
            let chat_id = query.message.as_ref().map_or(from, |m| m.chat().id.0);
            let intent = Intent::Button {
                query: query.id.0,
                message_id: query.message.as_ref().map(|m| m.id().0),
                token: query.data.unwrap_or_default(),
            };
            Some(Incoming { chat_id, from, intent })
        }
        UpdateKind::PreCheckoutQuery(query) => {
            let from = person(&query.from)?;
            let intent = Intent::PreCheckout {
                query: query.id.0,
                currency: query.currency,
                amount: query.total_amount.into(),
                payload: query.invoice_payload,
            };
            Some(Incoming { chat_id: from, from, intent })
        }
        UpdateKind::Error(_) => {
            // Of a kind that we know, in a shape that we do not: somebody waits for an answer.
            tracing::warn!(update_id = update.id.0, "an update cannot be read and is left out");
            None
        }
        _ => None,
    }
}

fn person(user: &User) -> Option<i64> {
    if user.is_bot { None } else { i64::try_from(user.id.0).ok() }
}

fn of_message(message: &Message, redacted: bool) -> Intent {
    match &message.kind {
        MessageKind::SuccessfulPayment(paid) => {
            let paid = &paid.successful_payment;
            return Intent::Paid(Charge {
                id: paid.telegram_payment_charge_id.0.clone(),
                currency: paid.currency.clone(),
                amount: paid.total_amount.into(),
                payload: paid.invoice_payload.clone(),
                recurring: paid.is_recurring,
            });
        }
        MessageKind::RefundedPayment(refund) => {
            let charge_id = refund.refunded_payment.telegram_payment_charge_id.0.clone();
            return Intent::Refunded { charge_id };
        }
        _ => {}
    }
    if !message.chat.is_private() {
        return Intent::Group;
    }
    if redacted {
        return Intent::Secret { message_id: message.id.0 };
    }
    match message.text().map(str::trim) {
        None | Some("") => Intent::Unreadable,
        Some(text) => command(text).map_or_else(|| Intent::Text(text.to_owned()), Intent::Command),
    }
}

/// `/word`, `/word@bot` or `/word argument`.
fn command(text: &str) -> Option<Command> {
    let rest = text.strip_prefix('/')?;
    let (word, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let (word, argument) = (word.split('@').next().unwrap_or_default().to_ascii_lowercase(), argument.trim());
    Some(match word.as_str() {
        "start" => Command::Start,
        "new" => Command::New(argument.to_owned()),
        "projects" => Command::Projects,
        "status" => Command::Status,
        "credits" => Command::Credits,
        "usage" => Command::Usage,
        "buy" => Command::Buy(argument.parse().ok()),
        "limit" => Command::Limit(argument.chars().take(32).collect()),
        "download" => Command::Download,
        "cancel" => Command::Cancel,
        "key" | "keys" => Command::Key,
        "help" => Command::Help,
        "paysupport" => Command::PaySupport,
        "terms" => Command::Terms,
        _ => Command::Unknown(word.chars().take(32).collect()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(extra: &Value) -> Value {
        let mut message = json!({"message_id": 7, "date": 1_760_000_000,
            "chat": {"id": 42, "type": "private", "first_name": "Ada"},
            "from": {"id": 42, "is_bot": false, "first_name": "Ada"}});
        for (key, value) in extra.as_object().unwrap() {
            message[key] = value.clone();
        }
        json!({"update_id": 1, "message": message})
    }

    fn intent(raw: &Value) -> Option<Intent> {
        parse(raw, false).map(|i| i.intent)
    }

    #[test]
    fn messages_become_intents() {
        let text = |t: &str| intent(&message(&json!({"text": t}))).unwrap();
        assert_eq!(text(" A shop "), Intent::Text("A shop".into()));
        assert_eq!(text("/start ref_1"), Intent::Command(Command::Start));
        assert_eq!(text("/BUY@some_bot 500"), Intent::Command(Command::Buy(Some(500))));
        assert_eq!(text("/new\na shop\nfor tea"), Intent::Command(Command::New("a shop\nfor tea".into())));
        assert_eq!(text("/limit 12.5"), Intent::Command(Command::Limit("12.5".into())));
        assert_eq!(text("/fly"), Intent::Command(Command::Unknown("fly".into())));
        assert_eq!(intent(&message(&json!({"hologram": {}}))), Some(Intent::Unreadable));
        assert_eq!(intent(&json!({"update_id": 1, "hologram": {}})), None);
        let photo =
            json!({"photo": [{"file_id": "a", "file_unique_id": "b", "width": 1, "height": 1, "file_size": 1}]});
        assert_eq!(intent(&message(&photo)), Some(Intent::Unreadable));
        let group = json!({"text": "hi", "chat": {"id": -5, "type": "group", "title": "g"}});
        assert_eq!(intent(&message(&group)), Some(Intent::Group));
        let bot = json!({"text": "hi", "from": {"id": 4, "is_bot": true, "first_name": "b"}});
        assert_eq!(intent(&message(&bot)), None);
        assert_eq!(
            parse(&message(&json!({"text": "[redacted]"})), true).unwrap().intent,
            Intent::Secret { message_id: 7 }
        );
    }

    #[test]
    fn payments_and_buttons_become_intents() {
        let payment = json!({"currency": "XTR", "total_amount": 250, "invoice_payload": "order:1",
            "telegram_payment_charge_id": "stx1", "provider_payment_charge_id": "p"});
        let charge = Charge {
            id: "stx1".into(),
            currency: "XTR".into(),
            amount: 250,
            payload: "order:1".into(),
            recurring: false,
        };
        assert_eq!(intent(&message(&json!({"successful_payment": payment}))), Some(Intent::Paid(charge)));
        assert_eq!(
            intent(&message(&json!({"refunded_payment": payment}))),
            Some(Intent::Refunded { charge_id: "stx1".into() })
        );
        // Paid in a group, answered to the payer.
        let group = json!({"id": -5, "type": "group", "title": "g"});
        let paid = parse(&message(&json!({"successful_payment": payment, "chat": group})), false).unwrap();
        assert!(paid.chat_id == 42 && matches!(paid.intent, Intent::Paid(_)), "{paid:?}");
        let raw = message(&json!({"successful_payment": payment}));
        let found = money(&raw).unwrap();
        assert_eq!(
            (found.kind, found.from(), &found.body["total_amount"]),
            ("successful_payment", Some(42), &json!(250))
        );
        assert!(money(&message(&json!({"text": "thanks", "reply_to_message": raw["message"]}))).is_none());
        let from = json!({"id": 42, "is_bot": false, "first_name": "Ada"});
        let raw =
            json!({"update_id": 3, "callback_query": {"id": "9", "from": from, "chat_instance": "c", "data": "t"}});
        assert_eq!(
            parse(&raw, false).unwrap(),
            Incoming {
                chat_id: 42,
                from: 42,
                intent: Intent::Button { query: "9".into(), message_id: None, token: "t".into() }
            }
        );
        let raw = json!({"update_id": 4, "pre_checkout_query":
            {"id": "77", "from": from, "currency": "XTR", "total_amount": 250, "invoice_payload": "order:1"}});
        assert!(matches!(intent(&raw), Some(Intent::PreCheckout { amount: 250, .. })));
        let stored = arrived(raw).unwrap();
        assert!(stored.urgent && stored.chat_id == Some(42));
        assert!(arrived(json!({"message": {}})).is_none());
    }
}
