//! Texts: pure functions from read models to what Telegram is sent.

use super::intent::COMMANDS;
use crate::{
    read::progress::{Progress, Standing},
    store::{
        credits::{Balance, Transaction, decimal},
        telegram::orders::Unpayable,
    },
};
use loopwright_activities::billing::purchase::Refund;
use loopwright_engine::view::{RunStatus, RunView};
use serde_json::{Value, json};
use teloxide::{
    payloads::{SendInvoice, SendInvoiceSetters, SendMessage, SendMessageSetters},
    types::{ChatId, InlineKeyboardButton, InlineKeyboardMarkup, LabeledPrice, LinkPreviewOptions, ParseMode},
    utils::html::escape,
};

/// Longest text of one message, in UTF-16 units. Telegram takes 4096; the rest is for headings.
pub const TEXT_MAX: usize = 3_800;
/// Longest label of a button, in characters. Chosen: what a phone shows.
const LABEL_MAX: usize = 48;
/// Cells of a progress bar.
const BAR: u32 = 10;

/// Rows of buttons: label and callback data.
pub type Keyboard = Vec<Vec<(String, String)>>;

/// The body of `SendMessage`, and of `EditMessageText` once the message's id is added.
#[must_use]
pub fn message(chat_id: i64, html: &str, keyboard: Keyboard) -> Value {
    let quiet = LinkPreviewOptions {
        is_disabled: true,
        url: None,
        prefer_small_media: false,
        prefer_large_media: false,
        show_above_text: false,
    };
    let mut payload = SendMessage::new(ChatId(chat_id), html).parse_mode(ParseMode::Html).link_preview_options(quiet);
    if !keyboard.is_empty() {
        let rows = keyboard.into_iter().map(|row| {
            row.into_iter().map(|(label, data)| InlineKeyboardButton::callback(cut(&label, LABEL_MAX), data))
        });
        payload = payload.reply_markup(InlineKeyboardMarkup::new(rows));
    }
    serde_json::to_value(&payload).unwrap_or_default()
}

/// The body of `SendInvoice`.
#[must_use]
pub fn invoice(chat_id: i64, stars: i32, credits: i64, payload: &str) -> Value {
    let title = format!("{credits} credits");
    let description = format!(
        "{credits} credits for {stars} Stars. They pay for the models that work on your projects and do not expire. \
         Other amounts: {}.",
        super::payments::PACKS
            .iter()
            .filter(|(other, _)| *other != stars)
            .map(|(other, _)| format!("/buy {other}"))
            .collect::<Vec<_>>()
            .join(", ")
    );
    let price = LabeledPrice::new(title.clone(), u32::try_from(stars).unwrap_or(0));
    let body = SendInvoice::new(ChatId(chat_id), title, description, payload, "XTR", [price]).provider_token("");
    serde_json::to_value(&body).unwrap_or_default()
}

/// Cuts plain text into pieces of at most `max` UTF-16 units, at line ends or spaces where there are some.
#[must_use]
pub fn split(text: &str, max: usize) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut rest = text.trim_end();
    while !rest.is_empty() {
        let mut units = 0;
        let fits = rest.char_indices().find(|(_, c)| {
            units += c.len_utf16();
            units > max
        });
        let Some((end, _)) = fits else {
            pieces.push(rest.to_owned());
            break;
        };
        // A break in the last half; otherwise one inside a word.
        let at = [rest[..end].rfind('\n'), rest[..end].rfind(' ')].into_iter().flatten().find(|at| *at > end / 2);
        // A single character is never wider than a piece.
        let at = at.unwrap_or(end).max(rest.chars().next().map_or(1, char::len_utf8));
        pieces.push(rest[..at].trim_end().to_owned());
        rest = rest[at..].trim_start_matches(['\n', ' ']);
    }
    pieces
}

/// Cuts to `max` characters.
#[must_use]
pub fn cut(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(max.saturating_sub(1)).collect();
    out.push('…');
    out
}

/// What one of our HTML messages says, without its formatting: only the tags that are written here go.
#[must_use]
pub fn unformatted(html: &str) -> String {
    let tags = ["b", "i", "code", "pre"].iter().flat_map(|tag| [format!("<{tag}>"), format!("</{tag}>")]);
    let out = tags.fold(html.to_owned(), |text, tag| text.replace(&tag, ""));
    out.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&amp;", "&")
}

/// The name of a project from its idea: the beginning of its first line.
#[must_use]
pub fn project_name(idea: &str) -> String {
    cut(idea.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("Project"), 60)
}

pub(super) fn greeting(balance: &Balance) -> String {
    format!(
        "<b>Hello!</b> Tell me what you would like to have built, and I work it out with you: I ask, make a plan, and \
         after your approval write the code, run its checks and document it.\n\nFor example:\n<i>A command line program \
         that renames photos by the date they were taken, with tests.</i>\n\nYou have <b>{}</b> credits. /help lists \
         what I understand.",
        balance.available
    )
}

pub(super) fn help() -> String {
    let list: Vec<String> = COMMANDS.iter().map(|(name, text)| format!("/{name} – {}", escape(text))).collect();
    format!("Write your idea to start a project.\n\n{}", list.join("\n"))
}

pub(super) fn not_allowed(from: i64) -> String {
    format!(
        "This bot is not open to everybody. If you should have access, give its operator your Telegram id: \
         <code>{from}</code>"
    )
}

pub(super) fn pay_support(from: i64) -> String {
    format!(
        "Questions about a payment go to the operator of this bot, not to Telegram. Name your Telegram id, \
         <code>{from}</code>, and the charge id of the receipt. A purchase of which nothing was used can be given back."
    )
}

pub(super) const KEY: &str = "You can let your projects use your own key of Gemini, OpenRouter or a server with the OpenAI \
    dialect: they then cost you no credits here. <b>Do not send the key in this chat</b>: I delete such messages and keep \
    nothing of them. Give it to the service itself, with a token from its operator:\n\
    <code>PUT /v1/keys {\"provider\": \"gemini\", \"key\": \"…\"}</code>\n\
    or let the operator run <code>loopwright api-keys add</code>. It is kept encrypted and never shown again.";

pub(super) const TERMS: &str = "Credits pay for the models that work on your projects, as /usage lists. They are no money \
    and cannot be sold or moved; a purchase of which nothing was used can be given back (/paysupport). What is built is \
    yours; check it before you rely on it. Your texts go to model providers as far as the work needs it. Do not send keys, \
    passwords or the data of others.";

pub(super) fn credits(balance: &Balance) -> String {
    let held = if balance.held_ucr > 0 {
        format!(" {} more are reserved for work under way.", decimal(balance.held_ucr))
    } else {
        String::new()
    };
    format!("You have <b>{}</b> credits.{held}\n/usage lists what went where, /buy adds to it.", balance.available)
}

/// What became of a payment that was to be given back, and why.
pub(super) fn refund(charge_id: &str, refund: &Refund) -> String {
    let Refund { stars, granted, taken, .. } = refund;
    let receipt = format!("Receipt: <code>{}</code>", escape(charge_id));
    if refund.state == "refused" {
        let why = escape(refund.error.as_deref().unwrap_or("it does not say why"));
        return format!(
            "Your payment of <b>{stars} Stars</b> could not be given back, Telegram says: {why}. Its {granted} credits are in your balance \
             again.\n{receipt}"
        );
    }
    let why = match &refund.reason {
        Some(reason) => format!(": {}", escape(reason)),
        None => String::new(),
    };
    let used = decimal(granted.0 - taken.0);
    let credits = if granted == taken {
        format!("Its {granted} credits were taken from your balance.")
    } else {
        format!("Of its {granted} credits {taken} were taken from your balance; {used} are used or at work.")
    };
    format!("↩️ Your payment of <b>{stars} Stars</b> was given back{why}. {credits}\n{receipt}")
}

pub(super) fn usage(rows: &[Transaction]) -> String {
    let lines: Vec<String> = rows
        .iter()
        .filter(|row| row.amount_ucr != 0)
        .map(|row| {
            let what = match row.kind.as_str() {
                "grant" => "granted",
                "purchase" => "bought",
                "capture" => "work",
                "expire" => "expired",
                "refund" => "given back",
                other => other,
            };
            let sign = if row.amount_ucr > 0 { "+" } else { "" };
            let at = row.created_at.format("%Y-%m-%d %H:%M");
            format!("{at}  {sign}{}  {what}  → {}", decimal(row.amount_ucr), decimal(row.balance_after_ucr))
        })
        .collect();
    if lines.is_empty() {
        return "Nothing was charged yet.".to_owned();
    }
    format!("<b>Latest changes of your balance</b> (UTC)\n<pre>{}</pre>", escape(&lines.join("\n")))
}

/// The message of a run that is edited as it goes.
#[must_use]
pub fn progress(name: &str, progress: &Progress, spent_ucr: i64, available: &str) -> String {
    let mark = match progress.standing {
        Standing::Working => "🔧",
        Standing::Asking => "💬",
        Standing::Credits | Standing::Limit | Standing::Blocked | Standing::Paused => "⏸",
        Standing::Stopping | Standing::Halted => "⏹",
        Standing::Closed(RunStatus::Completed) => "✅",
        Standing::Closed(RunStatus::Continued) => "↪️",
        Standing::Closed(_) => "⏹",
    };
    let mut lines = vec![format!("{mark} <b>{}</b>", escape(&cut(name, 60)))];
    let stage = match (progress.standing, progress.items) {
        (Standing::Closed(status), _) => sentence(status.as_str()),
        (_, Some((done, total))) if progress.stage == "Building" => {
            format!("{}: item {} of {total}", progress.stage, (done + 1).min(total))
        }
        _ => progress.stage.to_owned(),
    };
    lines.push(stage);
    if let Some((done, total)) = progress.items.filter(|(_, total)| *total > 0) {
        lines.push(bar(done, total));
    }
    match progress.standing {
        Standing::Credits => lines.push("Waits for credits: /buy, and it goes on by itself.".to_owned()),
        Standing::Limit => {
            lines.push("Has spent what you approved: /limit and a number of credits, and it goes on.".to_owned())
        }
        Standing::Closed(_) => {}
        _ => lines.push(format!("Now: {}", escape(&cut(&progress.now, 300)))),
    }
    if let Some(last) = &progress.last {
        lines.push(format!("Last: {}", escape(&cut(last, 300))));
    }
    lines.push(format!("Spent {} · {available} credits left", decimal(spent_ucr)));
    lines.join("\n")
}

fn bar(done: u32, total: u32) -> String {
    let full = (u64::from(done.min(total)) * u64::from(BAR) / u64::from(total.max(1))) as usize;
    let cells = BAR as usize;
    format!("{}{} {done}/{total}", "▓".repeat(full), "░".repeat(cells - full))
}

fn sentence(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect::<String>() + ".").unwrap_or_default()
}

/// What is told when a run has closed; with `again` under a button that lets it go on.
#[must_use]
pub fn end(name: &str, view: &RunView, spent_ucr: i64, again: bool) -> String {
    let name = escape(&cut(name, 60));
    let spent = decimal(spent_ucr);
    let text = |key: &str| view.output.as_ref().and_then(|o| o[key].as_str()).map(|t| escape(&cut(t, 64)));
    match view.status {
        RunStatus::Completed => {
            let verdict = match text("verdict").as_deref() {
                None => String::new(),
                Some("accept") => "\nVerdict: accepted by the verification.".to_owned(),
                Some("reject") => "\nVerdict: the verification found faults; you accepted it as it is.".to_owned(),
                Some(other) => format!("\nVerdict: {other}"),
            };
            let commit = text("commit").map(|c| format!("\nCommit: <code>{c}</code>")).unwrap_or_default();
            format!(
                "✅ <b>{name}</b> is done.{verdict}{commit}\nSpent: {spent} credits.\n/download sends it as a zip file."
            )
        }
        RunStatus::Continued => format!("↪️ <b>{name}</b> goes on with another run. Spent so far: {spent} credits."),
        RunStatus::Cancelled | RunStatus::Terminated => {
            format!("⏹ <b>{name}</b> was stopped. Spent: {spent} credits.\nWhat is done so far: /download")
        }
        _ => {
            let why = view.failure.as_ref().map_or_else(String::new, |failure| {
                format!("\n<code>{}</code>: {}", escape(&failure.code), escape(&cut(&failure.message, 500)))
            });
            let again = if again {
                "\nThe button begins the step again that failed. What was done before it is kept and paid; from there it may spend \
                 once more what you last approved."
            } else {
                ""
            };
            format!(
                "❌ <b>{name}</b> could not be finished.{why}\nSpent: {spent} credits.{again}\nWhat is done so far: /download"
            )
        }
    }
}

/// The step that ended a run, if that failed: there it can go on. Not behind a limit of the definition, which it would most often meet
/// again.
pub(super) fn failed_at(view: &RunView) -> Option<&str> {
    let failure = view.failure.as_ref().filter(|_| view.status == RunStatus::Failed)?;
    failure.path.as_deref().filter(|_| !failure.code.starts_with("limit."))
}

pub(super) fn no_credits(name: &str, message: &str) -> String {
    format!(
        "⏸ <b>{}</b> waits for credits: {}\nEverything done so far stands. /buy adds credits, and the work goes on by \
         itself.",
        escape(&cut(name, 60)),
        escape(&cut(message, 300))
    )
}

pub(super) fn limit_used(name: &str, message: &str) -> String {
    format!(
        "⏸ <b>{}</b> has spent what you approved: {}\nEverything done so far stands. <code>/limit 20</code> lets it spend 20 \
         credits more, and the work goes on; /cancel stops it.",
        escape(&cut(name, 60)),
        escape(&cut(message, 300))
    )
}

/// Why a payment is refused before it is made, for the buyer.
#[must_use]
pub fn unpayable(why: Unpayable) -> &'static str {
    match why {
        Unpayable::Currency => "Only Telegram Stars are taken.",
        Unpayable::Unknown => "This invoice is not known here. Ask for a new one with /buy.",
        Unpayable::Buyer => "This invoice was made for somebody else. Ask for your own with /buy.",
        Unpayable::Amount => "The amount differs from the invoice. Ask for a new one with /buy.",
        Unpayable::Paid => "This invoice is paid already. Ask for another with /buy.",
        Unpayable::Expired => "This invoice has expired. Ask for a new one with /buy.",
    }
}

/// The body of `AnswerCallbackQuery`; at most 200 characters are shown.
#[must_use]
pub fn callback_answer(query: &str, text: &str) -> Value {
    json!({"callback_query_id": query, "text": cut(text, 200)})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_split_at_breaks_and_lose_nothing() {
        let text = "word ".repeat(2_000);
        let pieces = split(&text, TEXT_MAX);
        assert!(pieces.len() == 3 && pieces.iter().all(|p| p.encode_utf16().count() <= TEXT_MAX));
        assert_eq!(pieces.join(" "), text.trim_end());
        let wide = "😀".repeat(3_000);
        let pieces = split(&wide, TEXT_MAX);
        assert!(pieces.iter().all(|p| p.encode_utf16().count() <= TEXT_MAX));
        assert_eq!(pieces.concat(), wide);
        assert_eq!(split("a\n\nb", 3), ["a", "b"]);
        assert!(split("", 10).is_empty());
    }

    #[test]
    fn what_users_and_models_wrote_cannot_be_markup() {
        let view = Progress {
            standing: Standing::Working,
            stage: "Building",
            items: Some((1, 4)),
            now: "Implement “<b>x</b> & y”".into(),
            last: None,
        };
        let html = progress("<script>", &view, 1_500_000, "8.5");
        assert_eq!(
            html,
            "🔧 <b>&lt;script&gt;</b>\nBuilding: item 2 of 4\n▓▓░░░░░░░░ 1/4\nNow: Implement “&lt;b&gt;x&lt;/b&gt; &amp; y”\n\
             Spent 1.5 · 8.5 credits left"
        );
        assert_eq!(
            unformatted(&html),
            "🔧 <script>\nBuilding: item 2 of 4\n▓▓░░░░░░░░ 1/4\nNow: Implement “<b>x</b> & y”\n\
             Spent 1.5 · 8.5 credits left"
        );
        assert_eq!(unformatted(&escape("&lt; <i>")), "&lt; <i>");
        assert_eq!(unformatted("if x < 10, <b>stop</b>"), "if x < 10, stop");
    }

    #[test]
    fn bodies_are_what_telegram_reads() {
        let body = message(42, "x", vec![vec![("y".repeat(100), "t".into())]]);
        assert_eq!(body["chat_id"], 42);
        assert_eq!(body["parse_mode"], "HTML");
        let button = &body["reply_markup"]["inline_keyboard"][0][0];
        assert_eq!(button["callback_data"], "t");
        assert_eq!(button["text"].as_str().unwrap().chars().count(), LABEL_MAX);
        let body = invoice(42, 250, 275, "order:1");
        assert_eq!((body["currency"].as_str(), body["payload"].as_str()), (Some("XTR"), Some("order:1")));
        assert_eq!(body["prices"], json!([{"label": "275 credits", "amount": 250}]));
        assert!(body["description"].as_str().unwrap().chars().count() <= 255, "{body}");
    }
}
