//! A Bot API on loopback. It keeps what it is told, and misbehaves on request as the real one does: it repeats updates,
//! asks for quiet, breaks, and hangs up after it has acted.

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, sync::Notify, task::JoinHandle, time::Instant};
use tower::Service;
use warp::{
    Filter,
    http::{Request, StatusCode},
    hyper::body::Incoming,
    reply::{Reply, Response},
};

pub const TOKEN: &str = "12345678:AAF7-g0gYncWnm5IyfZlpPRqRRv6kNAGlao";
/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(120);
/// A header of ours: hang up instead of answering.
const HANG_UP: &str = "x-hang-up";

/// How one call goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// 429 with this many seconds; nothing is done.
    Quiet(u64),
    /// 500; nothing is done.
    Broken,
    /// It is done, but the connection ends without an answer.
    HangUp,
    /// 403.
    Blocked,
    /// 409.
    Conflict,
    /// 400.
    Refused,
    /// 400 with these words.
    Says(&'static str),
}

/// A call that was made.
#[derive(Clone, Debug)]
pub struct Call {
    /// In lower case.
    pub method: String,
    /// JSON, or the text of a multipart body.
    pub body: Value,
    pub wrong: Option<Wrong>,
    pub at: Instant,
    /// Of the message that was sent or edited.
    pub message_id: i64,
}

impl Call {
    /// Whether Telegram did what was asked.
    pub fn done(&self) -> bool {
        matches!(self.wrong, None | Some(Wrong::HangUp))
    }
    pub fn text(&self) -> &str {
        self.body["text"].as_str().unwrap_or_default()
    }
    /// Callback data of the button with this label.
    pub fn button(&self, label: &str) -> Option<String> {
        let rows = self.body["reply_markup"]["inline_keyboard"].as_array()?;
        let mut buttons = rows.iter().flat_map(|row| row.as_array().into_iter().flatten());
        let button = buttons.find(|b| b["text"].as_str().is_some_and(|text| text.contains(label)))?;
        button["callback_data"].as_str().map(str::to_owned)
    }
}

#[derive(Default)]
struct State {
    updates: Vec<Value>,
    last_update: i64,
    last_message: i64,
    calls: Vec<Call>,
    wrongs: VecDeque<(String, Wrong)>,
    /// Polls that are answered as if nothing had been confirmed.
    repeats: u32,
    given: Vec<Value>,
    /// Charges that were given back.
    refunded: Vec<Value>,
}

/// The server. It ends with the value.
pub struct Fake {
    pub url: url::Url,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let state = Arc::new(Mutex::new(State { last_update: 1_000, last_message: 100, ..State::default() }));
        let changed = Arc::new(Notify::new());
        let task = tokio::spawn(serve(listener, state.clone(), changed.clone()));
        Self { url, state, changed, task }
    }

    /// Lets the next call of this method go wrong; several queue up.
    pub fn wrong(&self, method: &str, wrong: Wrong) {
        self.state.lock().unwrap().wrongs.push_back((method.to_lowercase(), wrong));
    }

    /// Gives everything again at the next polls.
    pub fn repeat(&self, polls: u32) {
        self.state.lock().unwrap().repeats += polls;
        self.changed.notify_waiters();
    }

    fn push(&self, make: impl FnOnce(&mut State) -> Value) -> i64 {
        let mut state = self.state.lock().unwrap();
        state.last_update += 1;
        let id = state.last_update;
        let mut update = make(&mut state);
        update["update_id"] = json!(id);
        state.updates.push(update);
        drop(state);
        self.changed.notify_waiters();
        id
    }

    /// A message of a user; `extra` is merged into it. Returns the message's id.
    pub fn says_with(&self, user: i64, extra: Value) -> i64 {
        let mut message_id = 0;
        self.push(|state| {
            state.last_message += 1;
            message_id = state.last_message;
            let mut message = json!({"message_id": message_id, "date": 1_790_000_000, "from": person(user),
                "chat": {"id": user, "type": "private", "first_name": "Ada"}});
            for (key, value) in extra.as_object().unwrap() {
                message[key] = value.clone();
            }
            json!({ "message": message })
        });
        message_id
    }

    pub fn says(&self, user: i64, text: &str) -> i64 {
        self.says_with(user, json!({ "text": text }))
    }

    /// A user changes what he said.
    pub fn edits(&self, user: i64, message_id: i64, text: &str) {
        self.push(|_| {
            json!({"edited_message": {"message_id": message_id, "date": 1_790_000_000, "edit_date": 1_790_000_060,
                "from": person(user), "chat": {"id": user, "type": "private", "first_name": "Ada"}, "text": text}})
        });
    }

    /// A user presses a button under a message.
    pub fn presses(&self, user: i64, message_id: i64, data: &str) {
        self.push(|state| {
            let message = json!({"message_id": message_id, "date": 1_790_000_000, "text": "…",
                "chat": {"id": user, "type": "private", "first_name": "Ada"}});
            json!({"callback_query": {"id": format!("q{}", state.last_update), "from": person(user),
                "message": message, "chat_instance": "c", "data": data}})
        });
    }

    /// An update as it stands, as somebody may forge one; its number is added.
    pub fn sends(&self, update: Value) {
        self.push(|_| update);
    }

    pub fn wants_to_pay(&self, user: i64, query: &str, amount: i64, payload: &str) {
        self.push(|_| {
            json!({"pre_checkout_query": {"id": query, "from": person(user), "currency": "XTR",
                "total_amount": amount, "invoice_payload": payload}})
        });
    }

    pub fn pays(&self, user: i64, charge: &str, amount: i64, payload: &str) {
        let payment = json!({"currency": "XTR", "total_amount": amount, "invoice_payload": payload,
            "telegram_payment_charge_id": charge, "provider_payment_charge_id": "p"});
        self.says_with(user, json!({ "successful_payment": payment }));
    }

    pub fn calls(&self) -> Vec<Call> {
        self.state.lock().unwrap().calls.clone()
    }

    /// Calls of a method that were carried out.
    pub fn done(&self, method: &str) -> Vec<Call> {
        self.calls().into_iter().filter(|c| c.method == method.to_lowercase() && c.done()).collect()
    }

    /// Waits until the calls show something.
    pub async fn until<T>(&self, what: &str, mut look: impl FnMut(&[Call]) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let changed = self.changed.notified();
            if let Some(found) = look(&self.calls()) {
                return found;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                let calls = self.calls();
                let shown: Vec<_> = calls.iter().filter(|c| c.method != "getupdates").collect();
                panic!("{what} did not happen: {shown:#?}");
            }
        }
    }

    /// Waits for a message with this text, sent or edited.
    pub async fn message(&self, part: &str) -> Call {
        self.until(part, |calls| calls.iter().rev().find(|c| c.done() && c.text().contains(part)).cloned()).await
    }

    /// Waits for so many calls of a method that were carried out.
    pub async fn count(&self, method: &str, n: usize) -> Vec<Call> {
        let method = method.to_lowercase();
        self.until(&format!("{n} × {method}"), |calls| {
            let found: Vec<_> = calls.iter().filter(|c| c.method == method && c.done()).cloned().collect();
            (found.len() >= n).then_some(found)
        })
        .await
    }
}

fn person(id: i64) -> Value {
    json!({"id": id, "is_bot": false, "first_name": "Ada", "language_code": "en"})
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>, changed: Arc<Notify>) {
    let routes = warp::path!(String / String)
        .and(warp::header::optional::<String>("content-type"))
        .and(warp::body::bytes())
        .then(move |bot: String, method: String, kind: Option<String>, body: bytes::Bytes| {
            let (state, changed) = (state.clone(), changed.clone());
            async move {
                if bot != format!("bot{TOKEN}") {
                    return refuse(StatusCode::UNAUTHORIZED, "Unauthorized", &json!({}));
                }
                let body = match kind.as_deref() {
                    Some("application/json") => serde_json::from_slice(&body).unwrap(),
                    Some("application/x-www-form-urlencoded") => form(&body),
                    _ => Value::String(String::from_utf8_lossy(&body).into_owned()),
                };
                call(&state, &changed, &method.to_lowercase(), body).await
            }
        });
    let inner = warp::service(routes);
    let service = tower::service_fn(move |request: Request<Incoming>| {
        let mut inner = inner.clone();
        async move {
            let Ok(response) = inner.call(request).await;
            // An error of the service closes the connection without an answer.
            if response.headers().contains_key(HANG_UP) { Err(io::Error::other("hung up")) } else { Ok(response) }
        }
    });
    loop {
        let Ok((socket, _)) = listener.accept().await else { return };
        let service = TowerToHyperService::new(service.clone());
        tokio::spawn(async move {
            let builder = auto::Builder::new(TokioExecutor::new());
            drop(builder.serve_connection(TokioIo::new(socket), service).await);
        });
    }
}

/// A form as other clients send it: what is no text is JSON in it.
fn form(body: &[u8]) -> Value {
    const TEXTS: [&str; 2] = ["text", "callback_query_id"];
    let fields = url::form_urlencoded::parse(body).map(|(name, value)| {
        let read = if TEXTS.contains(&&*name) { None } else { serde_json::from_str(&value).ok() };
        (name.into_owned(), read.unwrap_or_else(|| json!(value)))
    });
    Value::Object(fields.collect())
}

fn refuse(status: StatusCode, description: &str, parameters: &Value) -> Response {
    let body =
        json!({"ok": false, "error_code": status.as_u16(), "description": description, "parameters": parameters});
    warp::reply::with_status(warp::reply::json(&body), status).into_response()
}

fn accept(result: &Value) -> Response {
    warp::reply::json(&json!({"ok": true, "result": result})).into_response()
}

async fn call(state: &Mutex<State>, changed: &Notify, method: &str, body: Value) -> Response {
    if method == "getupdates" {
        return updates(state, changed, &body).await;
    }
    let (wrong, message_id) = {
        let mut state = state.lock().unwrap();
        let at = state.wrongs.iter().position(|(m, _)| m == method);
        let wrong = at.and_then(|at| state.wrongs.remove(at)).map(|(_, wrong)| wrong);
        let message_id = body["message_id"].as_i64().unwrap_or_else(|| {
            state.last_message += 1;
            state.last_message
        });
        state.calls.push(Call { method: method.to_owned(), body: body.clone(), wrong, at: Instant::now(), message_id });
        (wrong, message_id)
    };
    changed.notify_waiters();
    match wrong {
        Some(Wrong::Quiet(seconds)) => {
            let text = format!("Too Many Requests: retry after {seconds}");
            return refuse(StatusCode::TOO_MANY_REQUESTS, &text, &json!({ "retry_after": seconds }));
        }
        Some(Wrong::Broken) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error", &json!({})),
        Some(Wrong::Blocked) => {
            return refuse(StatusCode::FORBIDDEN, "Forbidden: bot was blocked by the user", &json!({}));
        }
        Some(Wrong::Conflict) => return refuse(StatusCode::CONFLICT, "Conflict", &json!({})),
        Some(Wrong::Says(words)) => return refuse(StatusCode::BAD_REQUEST, words, &json!({})),
        Some(Wrong::Refused) => return refuse(StatusCode::BAD_REQUEST, "Bad Request: CHARGE_NOT_FOUND", &json!({})),
        Some(Wrong::HangUp) | None if method == "refundstarpayment" => {
            let mut state = state.lock().unwrap();
            let charge = body["telegram_payment_charge_id"].clone();
            if state.refunded.contains(&charge) {
                return refuse(StatusCode::BAD_REQUEST, "Bad Request: CHARGE_ALREADY_REFUNDED", &json!({}));
            }
            state.refunded.push(charge);
            let response = accept(&json!(true));
            return match wrong {
                Some(_) => warp::reply::with_header(response, HANG_UP, "1").into_response(),
                None => response,
            };
        }
        Some(Wrong::HangUp) => {
            let response = accept(&json!(true));
            return warp::reply::with_header(response, HANG_UP, "1").into_response();
        }
        None => {}
    }
    accept(&match method {
        "getme" => json!({"id": 12_345_678, "is_bot": true, "first_name": "Loopwright", "username": "loopwright_bot",
            "can_join_groups": false, "can_read_all_group_messages": false, "supports_inline_queries": false,
            "can_connect_to_business": false, "has_main_web_app": false}),
        "sendmessage" | "editmessagetext" | "sendinvoice" | "editmessagereplymarkup" => {
            json!({"message_id": message_id, "date": 1_790_000_000, "text": body["text"],
                "chat": {"id": body["chat_id"], "type": "private", "first_name": "Ada"}})
        }
        "senddocument" => json!({"message_id": message_id, "date": 1_790_000_000,
            "chat": {"id": 42, "type": "private", "first_name": "Ada"},
            "document": {"file_id": "f", "file_unique_id": "u", "file_size": 1}}),
        _ => json!(true),
    })
}

async fn updates(state: &Mutex<State>, changed: &Notify, body: &Value) -> Response {
    let offset = body["offset"].as_i64();
    let wait = body["timeout"].as_u64().unwrap_or(0).min(1);
    let until = Instant::now() + Duration::from_secs(wait);
    loop {
        let notified = changed.notified();
        {
            let mut state = state.lock().unwrap();
            if let Some(at) = state.wrongs.iter().position(|(m, _)| m == "getupdates") {
                let (_, wrong) = state.wrongs.remove(at).unwrap();
                let call = Call {
                    method: "getupdates".into(),
                    body: body.clone(),
                    wrong: Some(wrong),
                    at: Instant::now(),
                    message_id: 0,
                };
                state.calls.push(call);
                return match wrong {
                    Wrong::Conflict => refuse(
                        StatusCode::CONFLICT,
                        "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running",
                        &json!({}),
                    ),
                    Wrong::Quiet(s) => refuse(
                        StatusCode::TOO_MANY_REQUESTS,
                        "Too Many Requests: retry after",
                        &json!({ "retry_after": s }),
                    ),
                    _ => warp::reply::with_header(accept(&json!([])), HANG_UP, "1").into_response(),
                };
            }
            if state.repeats > 0 {
                state.repeats -= 1;
                let all: Vec<_> = state.given.iter().chain(&state.updates).cloned().collect();
                return accept(&json!(all));
            }
            if let Some(offset) = offset {
                let (confirmed, open) =
                    state.updates.drain(..).partition(|u| u["update_id"].as_i64().is_some_and(|id| id < offset));
                state.updates = open;
                state.given.extend::<Vec<_>>(confirmed);
            }
            if !state.updates.is_empty() {
                return accept(&json!(state.updates));
            }
        }
        if tokio::time::timeout_at(until, notified).await.is_err() {
            return accept(&json!([]));
        }
    }
}
