//! Logs and metrics of the process.
//!
//! Secrets do not reach a log because their types cannot be printed; what a message might still carry (an address with
//! a password, a bearer token in an error of a library) is cut out of every line here, as the second door.

use crate::{
    config::{Log, LogFormat},
    secret,
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
    sync::OnceLock,
    time::Duration,
};
use tracing_subscriber::{EnvFilter, filter::Directive, fmt::MakeWriter};

/// Upper bounds of the duration histograms, in seconds. Chosen, not measured.
const DURATION_BUCKETS: &[f64] = &[0.005, 0.02, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0];

/// Libraries that log what they are given, which is what people have written: they say nothing at any level.
const SILENT: [&str; 1] = ["handlebars=off"];

/// Starts logging to standard error. A second call changes nothing.
///
/// # Errors
/// A filter that cannot be read, by name.
pub fn init(log: &Log) -> Result<(), crate::config::Error> {
    let filter = EnvFilter::try_new(&log.filter)
        .map_err(|e| crate::config::Error::value("log.filter", format!("`{}`: {e}", log.filter)))?;
    let silent = SILENT.into_iter().filter_map(|directive| directive.parse::<Directive>().ok());
    let filter = silent.fold(filter, EnvFilter::add_directive);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(Redacted);
    // A subscriber that is already there (a test's) stays.
    let _ = match log.format {
        LogFormat::Plain => builder.with_target(false).with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
    };
    Ok(())
}

/// The process's metrics. The first call installs the recorder; it opens no listener of its own.
pub fn metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let builder = PrometheusBuilder::new();
            let builder = builder.set_buckets(DURATION_BUCKETS).unwrap_or_else(|_| PrometheusBuilder::new());
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            // Another recorder (a test's) stays; then ours renders nothing, which is visible.
            let _ = metrics::set_global_recorder(recorder);
            handle
        })
        .clone()
}

/// Folds histogram samples now and then, so that they do not pile up between two scrapes.
pub async fn metrics_upkeep() {
    let mut tick = tokio::time::interval(Duration::from_secs(30));
    loop {
        tick.tick().await;
        metrics().run_upkeep();
    }
}

#[derive(Clone, Copy)]
struct Redacted;

impl<'a> MakeWriter<'a> for Redacted {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl Write for Redacted {
    /// The formatter hands over one whole line at a time.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        io::stderr().lock().write_all(redact(&text).as_bytes())?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Cuts out what looks like a secret: passwords in addresses, bearer tokens, keys of known shapes ([`secret`]).
#[must_use]
pub fn redact(text: &str) -> Cow<'_, str> {
    let mut out = Cow::Borrowed(text);
    // (what stands before a secret, which characters end it)
    const AFTER: &[(&str, &str)] = &[
        ("Bearer ", " \"',;)\n"),
        ("bearer ", " \"',;)\n"),
        // Wherever they stand: behind an escaped line break, or the colour of a terminal.
        ("sk-", " \"',;)&\n"),
        ("AIza", " \"',;)&\n"),
        ("?key=", " \"'&\n"),
        ("&key=", " \"'&\n"),
        ("/bot", "/ \"'\n"),
    ];
    for (before, ends) in AFTER {
        out = cut(out, before, ends);
    }
    // scheme://user:password@host
    let mut from = 0;
    while let Some(at) = out[from..].find("://") {
        let start = from + at + 3;
        let rest = &out[start..];
        let end = rest.find(|c: char| "/ \"'\n?".contains(c)).unwrap_or(rest.len());
        from = start;
        if let (Some(colon), Some(sign)) = (rest[..end].find(':'), rest[..end].rfind('@'))
            && colon < sign
        {
            let replaced = format!("{}[redacted]{}", &out[..start + colon + 1], &out[start + sign..]);
            out = Cow::Owned(replaced);
        }
    }
    match secret::redact(&out) {
        Some(redacted) => Cow::Owned(redacted),
        None => out,
    }
}

fn cut<'a>(text: Cow<'a, str>, before: &str, ends: &str) -> Cow<'a, str> {
    /// Shorter ones are words, not secrets.
    const SECRET_MIN: usize = 8;
    let mut out = text;
    let mut from = 0;
    while let Some(at) = out[from..].find(before) {
        let start = from + at + before.len();
        let rest = &out[start..];
        let end = rest.find(|c: char| ends.contains(c)).unwrap_or(rest.len());
        from = start;
        if end >= SECRET_MIN && !rest.starts_with("[redacted]") {
            let replaced = format!("{}[redacted]{}", &out[..start], &rest[end..]);
            out = Cow::Owned(replaced);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_known_shapes_are_cut_out() {
        for (text, expected) in [
            ("nothing here: a://b/c", "nothing here: a://b/c"),
            ("postgres://u:hunter2@h/d and a://x:y@z", "postgres://u:[redacted]@h/d and a://x:[redacted]@z"),
            ("header Bearer abc.def.ghi, next", "header Bearer [redacted], next"),
            ("GET https://x/v1?key=AIzaSyabcdefgh&alt=sse", "GET https://x/v1?key=[redacted]&alt=sse"),
            ("key sk-or-v1-0123456789abcdef\n", "key sk-[redacted]\n"),
            ("why=\\nsk-or-v1-0123 \u{1b}[0msk-own-master+key/x=", "why=\\nsk-[redacted] \u{1b}[0msk-[redacted]"),
            ("{\"why\":\"gsk_a1b2c3d4e5f6g7h8i9j0k1l2\"}\n", "{\"why\":\"[redacted]\"}\n"),
            ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJvd25lciIsImF1ZCI6IngifQ.c2lnbmF0dXJlIG9mIDMy", "token [redacted]"),
            ("https://api/bot123456:ABCDEF/getMe", "https://api/bot[redacted]/getMe"),
        ] {
            assert_eq!(redact(text), expected);
        }
    }
}
