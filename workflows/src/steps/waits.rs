//! Steps that wait: for time, for a signal, for a person.

use super::Steps;
use crate::{
    check,
    diagnostic::Severity,
    document::{Content, Node},
    read::{Fields, data},
    scope::Scope,
};
use loopwright_engine::definition::{Approval, Await, Data, Kind, OnTimeout, Template, WaitUntil, inputs::violations};

/// The one whom the surfaces ask today.
const OWNER: &str = "role:owner";
const WAIT_MAX_MS: u64 = 90 * 86_400_000;

impl Steps<'_> {
    pub(super) fn wait(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let fields = Fields::new(node, "`wait`", &["for", "until", "max"], self.sink)?;
        let until = match (fields.get("for"), fields.get("until")) {
            (Some(_), None) => WaitUntil::For(self.bounded(&fields, "for")?),
            (None, Some(at)) => {
                let at = self.checked(at, scope)?;
                if !fields.has("max") {
                    self.sink.error_help("WF421", node.span, &node.path, "`wait.until` needs `max`", "add `max: 7d`");
                }
                WaitUntil::Instant { at, max_ms: self.bounded(&fields, "max").unwrap_or(WAIT_MAX_MS) }
            }
            _ => {
                let message = "`wait` needs `for`, or `until` with `max`";
                self.sink.error_help("WF421", node.span, &node.path, message, "for example `wait: { for: 5m }`");
                return None;
            }
        };
        Some(Kind::Wait { until })
    }

    /// A duration of at most 90 days.
    pub(super) fn bounded(&mut self, fields: &Fields<'_>, name: &str) -> Option<u64> {
        let ms = fields.duration(name, self.sink)?;
        if ms > WAIT_MAX_MS {
            self.sink.error(
                "WF422",
                fields.key_span(name),
                &fields.node.path,
                format!("`{name}` must be a literal of at most 90d"),
            );
        }
        Some(ms)
    }

    pub(super) fn human(
        &mut self,
        fields: &Fields<'_>,
        what: &str,
        scope: &Scope,
    ) -> (u64, Option<Template>, Vec<String>, Vec<u64>) {
        let node = fields.node;
        if !fields.has("timeout") {
            self.sink.error_help(
                "WF421",
                node.span,
                &node.path,
                format!("`{what}` needs `timeout`"),
                "add `timeout: 7d`",
            );
        }
        let timeout_ms = self.bounded(fields, "timeout").unwrap_or(self.timeout_ms);
        if timeout_ms > self.timeout_ms {
            self.sink.warn(
                "WF425",
                fields.key_span("timeout"),
                &node.path,
                "the wait is longer than the run's `timeout`",
            );
        }
        let show = fields.text("show", self.sink).map(|text| {
            let at = fields.get("show").map_or((node.span, node.path.as_str()), |n| (n.span, n.path.as_str()));
            scope.check_template(&text, at.0, at.1, self.sink);
            Template(text)
        });
        let to = fields.texts("to", self.sink);
        for (who, span) in to.iter().filter(|(who, _)| who != OWNER) {
            let message = format!("`{who}` is not asked yet: only the owner of the run can answer");
            let help = format!("write `to: [\"{OWNER}\"]`");
            self.sink.add("WF224", Severity::Warning, *span, &node.path, message, Some(help));
        }
        let to = to.into_iter().map(|(t, _)| t).collect();
        let mut remind_ms = Vec::new();
        if let Some(list) = fields.get("remind") {
            match &list.kind {
                Content::List(items) if items.len() <= 10 => {
                    remind_ms = items.iter().filter_map(|i| crate::read::duration(i, self.sink)).collect();
                    remind_ms.sort_unstable();
                }
                _ => self.sink.error("WF422", list.span, &list.path, "`remind` is a list of at most 10 durations"),
            }
        }
        (timeout_ms, show, to, remind_ms)
    }

    pub(super) fn awaiting(&mut self, node: &Node, scope: &Scope) -> Option<Kind> {
        let known =
            ["signal", "timeout", "form", "show", "to", "where", "remind", "on-timeout", "default", "reply", "key"];
        let fields = Fields::new(node, "`await`", &known, self.sink)?;
        fields.refuse_later("key", self.sink);
        let Some(signal) = fields.text("signal", self.sink) else {
            self.sink.error_help(
                "WF421",
                node.span,
                &node.path,
                "`await` needs `signal`",
                "add `signal: user_message`",
            );
            return None;
        };
        let (timeout_ms, show, to, remind_ms) = self.human(&fields, "await", scope);
        let on_timeout = fields.word(
            "on-timeout",
            &[("fail", OnTimeout::Fail), ("default", OnTimeout::Default)],
            OnTimeout::Fail,
            self.sink,
        );
        let form = fields.get("form").map(|n| (n.value(), n));
        let form_usable = form.as_ref().is_none_or(|(form, at)| check::schema(form, at, "`form`", self.sink));
        let form = form.map(|(form, _)| form);
        let mut sites = Vec::new();
        let default = fields.get("default").map(|n| data(n, &mut sites, self.sink));
        sites.iter().for_each(|site| scope.check(site, self.sink));
        if on_timeout == OnTimeout::Default && default.is_none() {
            self.sink.error_help(
                "WF621",
                node.span,
                &node.path,
                "`on-timeout: default` needs `default`",
                "add the payload that stands for silence",
            );
        }
        if let (Some(form), Some(Data::Literal(value)), true) = (&form, &default, form_usable) {
            let problems = violations(form, value);
            if !problems.is_empty() {
                self.sink.error(
                    "WF621",
                    fields.key_span("default"),
                    &node.path,
                    format!("`default` does not satisfy `form`: {}", problems.join("; ")),
                );
            }
        }
        let mut inner = scope.clone();
        inner.signal = true;
        let filter = fields.get("where").and_then(|n| self.checked(n, &inner));
        let mut sites = Vec::new();
        let reply = fields.get("reply").map(|n| data(n, &mut sites, self.sink));
        sites.iter().for_each(|site| inner.check(site, self.sink));
        Some(Kind::Await(Box::new(Await {
            signal,
            timeout_ms,
            form,
            show,
            to,
            filter,
            remind_ms,
            on_timeout,
            default,
            approval: None,
            reply,
        })))
    }

    pub(super) fn approve(&mut self, node: &Node, id: &str, scope: &Scope) -> Option<Kind> {
        let known = ["to", "timeout", "show", "quorum", "remind", "on-timeout", "on-reject", "form", "allow-self"];
        let fields = Fields::new(node, "`approve`", &known, self.sink)?;
        for later in ["form", "allow-self"] {
            fields.refuse_later(later, self.sink);
        }
        let (timeout_ms, show, to, remind_ms) = self.human(&fields, "approve", scope);
        let words = [("fail", OnTimeout::Fail), ("approve", OnTimeout::Approve), ("reject", OnTimeout::Reject)];
        let on_timeout = fields.word("on-timeout", &words, OnTimeout::Fail, self.sink);
        if on_timeout == OnTimeout::Approve {
            self.sink.warn("WF622", fields.key_span("on-timeout"), &node.path, "silence counts as approval");
        }
        let approval = Approval {
            quorum: fields.integer("quorum", 1..=100, self.sink).unwrap_or(1),
            fail_on_reject: fields.word("on-reject", &[("fail", true), ("continue", false)], true, self.sink),
        };
        Some(Kind::Await(Box::new(Await {
            signal: id.to_owned(),
            timeout_ms,
            form: None,
            show,
            to,
            filter: None,
            remind_ms,
            on_timeout,
            default: None,
            approval: Some(approval),
            reply: None,
        })))
    }
}
