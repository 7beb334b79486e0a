//! Reads the sources: between any two awaits of the paths that change a run stands a crash point.
//!
//! What is compared is the text, from one await of a function to the next. Between two of them nobody can tell at which instant a
//! process dies, so one point for each gap is enough. None is asked for
//! - after an await that changes nothing that outlives the process ([`STILL`], and a plain `select`);
//! - between two arms of a `match` or an `if`, and behind a `return`: the second does not follow the first;
//! - at the end of a closure of `in_transaction`: its commit follows, which has its point in `transaction.rs`;
//! - after the last await of a function: its caller has a point there, or it is a task and ends.
//!
//! A loop's way back from its last await to its first is not seen. Anything else needs an entry in [`LEFT_OUT`] or [`ALLOWED`], with a
//! reason; an entry that nothing needs is an error. Which files these are is [`FILES`]: another one with an await must be named in
//! [`WITHOUT`], with a reason as well.

use std::{collections::BTreeSet, fs, path::Path};

/// The files of the paths, in this workspace.
const FILES: [&str; 41] = [
    "engine/src/committer.rs",
    "engine/src/transaction.rs",
    "engine/src/client.rs",
    "engine/src/client/fork.rs",
    "engine/src/client/migrate.rs",
    "engine/src/client/pause.rs",
    "engine/src/client/start.rs",
    "engine/src/client/update.rs",
    "engine/src/schedule/door.rs",
    "engine/src/store/blobs.rs",
    "engine/src/store/chain.rs",
    "engine/src/store/checkpoints.rs",
    "engine/src/store/forks.rs",
    "engine/src/store/groups.rs",
    "engine/src/store/inbox.rs",
    "engine/src/store/migrations.rs",
    "engine/src/store/ready.rs",
    "engine/src/store/runs.rs",
    "engine/src/store/schedules.rs",
    "engine/src/store/starts.rs",
    "engine/src/store/transitions.rs",
    "engine/src/store/workers.rs",
    "engine/src/worker/admit.rs",
    "engine/src/worker/context.rs",
    "engine/src/worker/drive.rs",
    "engine/src/worker/drive/item.rs",
    "engine/src/worker/fire.rs",
    "engine/src/worker/lease.rs",
    "engine/src/worker/mod.rs",
    "engine/src/worker/overdue.rs",
    "engine/src/worker/strays.rs",
    "engine/src/worker/terminate.rs",
    "activities/src/billing/call.rs",
    "activities/src/billing/caps.rs",
    "activities/src/billing/doubt.rs",
    "activities/src/billing/hold.rs",
    "activities/src/billing/hook.rs",
    "activities/src/billing/ledger.rs",
    "activities/src/billing/kin.rs",
    "activities/src/billing/limit.rs",
    "activities/src/billing/policy.rs",
];

/// Where all files with an await are looked for.
const ROOTS: [&str; 2] = ["engine/src", "activities/src/billing"];

/// Files with awaits, or folders of such, in which no point is wanted, and why.
const WITHOUT: &[(&str, &str)] = &[
    ("engine/src/activity.rs", "hands on to `worker/context.rs`"),
    ("engine/src/bench/", "measures on a database of its own"),
    ("engine/src/client/archive.rs", "a file is read, or becomes a run in one transaction"),
    ("engine/src/client/payload.rs", "by an operator's word: a statement a row, and what is done is not done again"),
    ("engine/src/client/query.rs", "reads only"),
    ("engine/src/embedded/", "a server of our own, before there is a worker"),
    ("engine/src/migrate.rs", "migrations, each in one transaction, before there is a worker"),
    ("engine/src/payload/mod.rs", "reads only: what is put apart is put by its callers"),
    (
        "engine/src/retention/mod.rs",
        "old runs: its points stand where a file or a table changes, and have a test of their own",
    ),
    ("engine/src/store/archive.rs", "a file becomes a run in one transaction"),
    ("engine/src/store/conformance.rs", "a test"),
    ("engine/src/store/conformance/", "a test"),
    ("engine/src/store/definitions.rs", "a definition is deployed in one transaction, which moves no run"),
    ("engine/src/store/history.rs", "reads only"),
    ("engine/src/store/mod.rs", "a wake-up is a hint: the poll is right without it"),
    (
        "engine/src/store/outbox.rs",
        "what chats are told of, in its reader's transaction: rolled back, it is there again",
    ),
    ("engine/src/store/partitions.rs", "months of `history`, each in one transaction; points where one is dropped"),
    ("engine/src/store/partitions/tests.rs", "a test"),
    ("engine/src/store/ready_tests.rs", "a test"),
    ("engine/src/store/retention.rs", "old runs, in one transaction that has its point"),
    ("engine/src/store/retention/families.rs", "reads only"),
    ("engine/src/store/retention/tests.rs", "a test"),
    ("engine/src/store/sealed.rs", "by an operator's word: a statement a row, and what is done is not done again"),
    ("engine/src/store/spread.rs", "reads only"),
    ("engine/src/store/transitions_tests.rs", "a test"),
    ("engine/src/testing/", "a test"),
    ("engine/src/worker/depth.rs", "reads only: gauges"),
    ("engine/src/worker/executor.rs", "waits for an activity, which writes by `worker/context.rs`"),
    ("engine/src/worker/keys.rs", "reads only"),
    ("engine/src/worker/retain.rs", "the turns of `retention/mod.rs`"),
    ("engine/src/worker/slots.rs", "memory of the process"),
    ("activities/src/billing/audit.rs", "a job or an operator, in one transaction that has no run"),
    ("activities/src/billing/books.rs", "findings: of a doubted cost one statement, otherwise of jobs"),
    (
        "activities/src/billing/forecast.rs",
        "what a plan may cost: one statement of its step, by whose path it is kept once",
    ),
    ("activities/src/billing/parked.rs", "reads only"),
    ("activities/src/billing/price.rs", "reads only"),
    ("activities/src/billing/pricelist.rs", "by an operator's word, in one transaction"),
    ("activities/src/billing/purchase.rs", "a payment, in one transaction that has no run"),
    ("activities/src/billing/report.rs", "reads only"),
    (
        "activities/src/billing/returned.rs",
        "wakes runs by the client, which has its points; not to be woken is to look later",
    ),
    ("activities/src/billing/spent.rs", "reads only"),
];

/// Calls whose await changes nothing: dying behind it is dying before it.
const STILL: &[(&str, &[&str])] = &[
    (
        "a connection or an open transaction, in which nothing was said yet",
        &[".conn()", ".connect()", "acquire()", "begin(", "begin_within(", "transaction::on("],
    ),
    ("a savepoint of a transaction that is still open", &["starts::keep(", "starts::undo("]),
    ("a pause", &["sleep(", ".away(", "empty()"]),
    (
        "reads rows of the engine",
        &[
            "mark(&mut tx)",
            "definitions::load(",
            "definitions::pointer(",
            "definitions::terms(",
            "definitions::concurrency(",
            "runs::load(",
            "runs::standing(",
            "runs::now(",
            "runs::unreadable(",
            "read(&mut *conn, run)",
            "store::pending(",
            "store::pending_count(",
            "store::open_runs(",
            "store::newest_replacing(",
            "store::waiting(",
            "store::count(",
            "store::now(",
            "store::get(",
            "store::recent(",
            "fire::startable(",
            "groups::anybody_waits(",
            "groups::wanted(",
            "groups::cancelled(",
            "groups::expired(",
            "groups::waits(",
            "starts::holder(",
            "starts::last_closed(",
            "Arrives::by(",
            "payload::pack_known(",
            "payload::read(",
            "inbox::read(",
            "inbox::knows(",
            "inbox::update_sent(",
            "is_wanted(",
            "left(conn",
            "retention::absent(",
            "Spread::among(",
            "Spread::of(",
            "decide(conn, &loaded",
            "keys.look(",
            "shared.pinned(",
            "self.open(",
            "self.handed_on(",
            "self.refusal(",
            "client.open(",
            "client.refusal(",
            "self.describe(",
            "self.decide_fork(",
            "self.decide_reset(",
            "self.updated(",
            "self.arrives(",
            "decided.arrives(",
            "decided.is_there(",
        ],
    ),
    (
        "reads rows of the ledger, whose user is locked",
        &[
            "call::brings_keys(",
            "call::facts(",
            "call::under_way(",
            "platform_key(",
            "hold::reservable(",
            "kin::line(",
            "Kin::of(",
            "Kin::find(",
            "Self::find(",
            "bound(conn, ",
            "newest(conn, ",
            "spent(conn, ",
            "in_force(conn, run)",
            "spent::",
            "cap.used_up(",
            "price::",
            "self.wanted(",
        ],
    ),
];

/// (file, function, why none of its awaits needs a point).
const LEFT_OUT: &[(&str, &str, &str)] = &[
    ("engine/src/client.rs", "described", "reads only"),
    ("engine/src/client.rs", "history", "reads only"),
    ("engine/src/client.rs", "unless_gone", "reads only"),
    ("engine/src/client/fork.rs", "began", "reads only"),
    ("engine/src/client/fork.rs", "decide_fork", "reads only; what it decides is written by `insert` and `begin`"),
    ("engine/src/client/fork.rs", "decide_reset", "reads only; what it decides is written by `reset`"),
    ("engine/src/client/fork.rs", "state_at", "reads only"),
    ("engine/src/client/migrate.rs", "definition_named", "reads only"),
    ("engine/src/client/update.rs", "updated", "reads only: waits for an answer"),
    ("engine/src/schedule/door.rs", "describe", "reads only"),
    ("engine/src/store/groups.rs", "forget", "once a minute, in one transaction: nobody waits for what it forgets"),
    ("engine/src/store/ready.rs", "due_in", "a look; what it notes of long queues is an index, and one statement"),
    ("engine/src/store/ready.rs", "keys", "reads only"),
    ("engine/src/store/runs.rs", "count", "reads only"),
    ("engine/src/store/runs.rs", "list", "reads only"),
    ("engine/src/store/runs.rs", "load", "reads only"),
    ("engine/src/store/runs.rs", "load_all", "reads only"),
    ("engine/src/store/runs.rs", "loaded", "reads only"),
    ("engine/src/store/starts.rs", "has_left", "reads only"),
    ("engine/src/transaction.rs", "plan", "of a test"),
    ("engine/src/transaction.rs", "was_committed", "reads only"),
    ("engine/src/worker/mod.rs", "listen", "a wake-up is a hint: the poll is right without it"),
    ("engine/src/worker/mod.rs", "write_progress", "progress is shown to people, and nothing hangs on it"),
    ("activities/src/billing/doubt.rs", "asked_again", "a job that asks providers again, in one transaction"),
    ("activities/src/billing/doubt.rs", "resolve", "that job or an operator, in one transaction"),
    ("activities/src/billing/doubt.rs", "resolve_finding", "by an operator's word, in one transaction"),
    (
        "activities/src/billing/hook.rs",
        "abandon",
        "`settle` of one attempt after the other, of a run that cannot be read",
    ),
    ("activities/src/billing/hook.rs", "wanted", "reads only"),
    ("activities/src/billing/ledger.rs", "adjusted", "by an operator's word, in one transaction that has no run"),
    ("activities/src/billing/ledger.rs", "ensure_user", "a user's first sight, in a transaction of the door"),
    ("activities/src/billing/ledger.rs", "expire", "a task of its own once a minute, in one transaction"),
    ("activities/src/billing/ledger.rs", "resume_holds", "by an operator's word, in one transaction"),
    ("activities/src/billing/limit.rs", "raise", "by somebody's word, in one transaction that has no run"),
    ("activities/src/billing/limit.rs", "set", "by a step or somebody's word, in one transaction, once by its key"),
    ("activities/src/billing/policy.rs", "rejected_runs", "a task of its own once a minute, in one transaction"),
];

/// (file, function, what the await says, why there is no point between it and the one before).
const ALLOWED: &[(&str, &str, &str, &str)] = &[
    ("engine/src/store/starts.rs", "lock_to_end", "query_scalar(open)", "reads"),
    ("engine/src/transaction.rs", "ask", "question(&mut conn)", "only where no session was there"),
    (
        "engine/src/transaction.rs",
        "in_transaction_within",
        "timeout_at(until, done)",
        "the block above, which is carried out here",
    ),
    ("engine/src/transaction.rs", "in_transaction_within", "was_committed(", "only where a COMMIT had no answer"),
    (
        "engine/src/transaction.rs",
        "in_transaction_within",
        "match attempt",
        "the block above, which is carried out here",
    ),
    ("engine/src/worker/context.rs", "at_once", "calls.ask(ask)", "the question above, which is asked here"),
    ("engine/src/worker/context.rs", "note_once", "calls.ask(ask)", "the question above, which is asked here"),
    ("engine/src/worker/context.rs", "meter_close", "stored", "the task above, whose end is waited for"),
    ("engine/src/worker/context.rs", "insist_alone", "stored", "the task above, whose end is waited for"),
    ("engine/src/worker/context.rs", "note_alone", "stored", "the task above, whose end is waited for"),
    ("engine/src/worker/drive.rs", "drive", "set_aside", "the question above, which is asked here"),
    ("engine/src/worker/drive.rs", "drive", "give_back(", "only where Postgres could not be told"),
    ("engine/src/worker/drive.rs", "drive_part", "loaded", "the question above, which is asked here"),
    ("engine/src/worker/drive.rs", "is_there", "asked", "the question above, which is asked here"),
    ("engine/src/worker/drive.rs", "nothing_happened", "ask(released)", "the question above, which is asked here"),
    ("engine/src/worker/drive.rs", "run", "orders", "the question above, which is asked here; it reads"),
    ("engine/src/worker/lease.rs", "renew", "timeout(lease / 2, beat)", "the block above, which is carried out here"),
    ("engine/src/worker/mod.rs", "start_with", "registered", "the question above, which is asked here"),
    (
        "engine/src/worker/terminate.rs",
        "closing",
        "last_of_unreadable(",
        "only where the one before has failed, which reads",
    ),
    ("activities/src/billing/hold.rs", "release_abandoned", "settle(", "what is before it reads"),
    ("activities/src/billing/policy.rs", "attempt_ended", "give(", "what is before it reads"),
];

/// The text with comments and what stands in quotes made blank; every byte keeps its place.
fn blank(raw: &str) -> String {
    let bytes = raw.as_bytes();
    let mut out = bytes.to_vec();
    let mut clear = |from: usize, to: usize| out[from..to].iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
    let find = |what: &str, from: usize| raw[from..].find(what).map_or(raw.len(), |at| from + at);
    let mut at = 0;
    while at < bytes.len() {
        let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
        let is_raw = bytes[at] == b'r'
            && bytes.get(at + 1 + hashes) == Some(&b'"')
            && (at == 0 || !(bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_'));
        if raw[at..].starts_with("//") {
            let end = find("\n", at);
            clear(at, end);
            at = end;
        } else if is_raw {
            let from = at + hashes + 2;
            let end = find(&format!("\"{}", "#".repeat(hashes)), from);
            clear(from, end);
            at = end + 1 + hashes;
        } else if bytes[at] == b'"' {
            let mut end = at + 1;
            while bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            clear(at + 1, end);
            at = end + 1;
        } else if bytes[at] == b'\'' && bytes[at + 1] == b'\\' {
            let end = find("'", at + 3);
            clear(at + 1, end);
            at = end + 1;
        } else if bytes[at] == b'\'' && bytes.get(at + 2) == Some(&b'\'') {
            clear(at + 1, at + 2);
            at += 3;
        } else {
            at += 1;
            while !raw.is_char_boundary(at) {
                at += 1;
            }
        }
    }
    String::from_utf8(out).expect("whole characters were made blank")
}

/// [`blank`], up to the tests at the end of a file. A module of tests that has a file of its own ends nothing.
fn without_tests(raw: &str) -> String {
    let mut code = blank(raw);
    let marks = ["\n#[cfg(test)]", "\n#[cfg(all(test"].iter().flat_map(|mark| code.match_indices(mark));
    let inline = |at: &usize| {
        let item = &code[*at..];
        let end = item.find(['{', ';']).unwrap_or(item.len());
        item[end..].starts_with('{') && item[..end].contains("mod ")
    };
    let tests = marks.map(|(at, _)| at).filter(inline).min();
    code.truncate(tests.unwrap_or(code.len()));
    code
}

/// Where something is awaited.
fn awaits(code: &str) -> impl Iterator<Item = usize> {
    let ends = |at: &usize| !code[at + AWAIT.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_');
    code.match_indices(AWAIT).map(|(at, _)| at).filter(ends)
}

/// (name, body) of each function.
fn functions(code: &str) -> Vec<(&str, std::ops::Range<usize>)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        if code[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let name = code[at + 3..].split(|c: char| !c.is_alphanumeric() && c != '_').next().expect("name");
        let (mut depth, mut open, mut nested) = (0, None, 0);
        for (n, c) in code[at..].char_indices() {
            match (c, open) {
                ('(' | '[', None) => depth += 1,
                (')' | ']', None) => depth -= 1,
                (';', None) if depth == 0 => break,
                ('{', None) if depth == 0 => open = Some(at + n),
                ('{', Some(_)) => nested += 1,
                ('}', Some(from)) if nested == 0 => {
                    found.push((name, from..at + n));
                    break;
                }
                ('}', Some(_)) => nested -= 1,
                _ => {}
            }
        }
    }
    found
}

/// Where the expression begins that is awaited at `at`: behind the statement, the arm or the block's beginning before it.
fn beginning(code: &str, from: usize, at: usize) -> usize {
    let (bytes, mut parens, mut braces) = (code.as_bytes(), 0, 0);
    for n in (from..at).rev() {
        let level = parens == 0 && braces == 0;
        match bytes[n] {
            b')' | b']' => parens += 1,
            b'(' | b'[' if parens > 0 => parens -= 1,
            b'}' if level => return n + 1,
            b'}' => braces += 1,
            b'{' if braces == 0 => return n + 1,
            b'{' => braces -= 1,
            b';' if level => return n + 1,
            b'>' if level && bytes[n - 1] == b'=' => return n + 1,
            _ => {}
        }
    }
    from
}

/// Whether a query that is written here locks and changes nothing.
fn only_reads(expression: &str) -> bool {
    let Some(text) = expression.split('"').nth(1) else { return false };
    let text = text.trim().to_lowercase();
    let locks = ["for update", "for no key update", "for share", "for key share"];
    text.starts_with("select") && !locks.iter().any(|lock| text.contains(lock))
}

/// Whether the second of two awaits needs no point before it. `raw`, `code`: what stands between them; `before`: the function up
/// to the first; `first`: its expression.
fn is_marked(raw: &str, code: &str, before: &str, first: &str) -> bool {
    let squeezed: String = code.split_whitespace().collect();
    // The first is an argument of the second.
    let same_statement = squeezed.chars().all(|c| "?)}".contains(c));
    let ends_transaction = ["in_transaction(", ".once("].iter().any(|begins| before.contains(begins))
        && ["})})", "}))"].iter().any(|end| squeezed.contains(end));
    // `let … else` leaves, and is no second way.
    let or_else = code.match_indices(" else ").map(|(at, _)| at).find(|at| code[..*at].trim_end().ends_with('}'));
    let other_way = code.find("=>").into_iter().chain(or_else).min();
    let other_way =
        other_way.is_some_and(|at| !code[..at].contains('{') && (code[..at].contains('}') || code[..at].contains(',')));
    let leaves = code.split_once(';').is_some_and(|(rest, next)| {
        let next = next.trim_start();
        let end = next.find('}').unwrap_or(next.len());
        !rest.contains(['{', '}'])
            && ["return", "break", "continue"].iter().any(|word| next.starts_with(word))
            && !next[..end].contains('{')
            && next[..end].matches(';').count() <= 1
    });
    let is_last = first.trim_start().starts_with("return");
    raw.contains("crash_point(\"") || same_statement || ends_transaction || other_way || leaves || is_last
}

const AWAIT: &str = ".await";

/// What lacks a point.
#[derive(Debug, PartialEq)]
struct Bare {
    function: String,
    line: usize,
    expression: String,
}

/// Awaits without a crash point between them and the one before. `still`: whether an expression changes nothing.
fn bare(raw: &str, mut still: impl FnMut(&str) -> bool, left_out: impl Fn(&str) -> bool) -> Vec<Bare> {
    let code = without_tests(raw);
    let code = code.as_str();
    let mut found = Vec::new();
    for (name, body) in functions(code) {
        if left_out(name) {
            continue;
        }
        let (mut last, mut seen) = (None::<(usize, &str)>, body.start);
        for at in awaits(&code[body.clone()]) {
            let (at, end) = (body.start + at, body.start + at + AWAIT.len());
            let from = beginning(code, seen, at);
            let (written, expression) = (&raw[from..at], &code[from..at]);
            seen = end;
            // What stands around the one before, and is waited for with it.
            if expression.chars().all(|c| c.is_whitespace() || "?)}".contains(c)) {
                continue;
            }
            if still(expression) || only_reads(written) {
                continue;
            }
            if let Some((before, first)) = last
                && !is_marked(&raw[before..at], &code[before..at], &code[body.start..before], first)
            {
                let expression = written.split_whitespace().collect::<Vec<_>>().join(" ");
                found.push(Bare { function: name.to_owned(), line: raw[..at].matches('\n').count() + 1, expression });
            }
            last = Some((end, expression));
        }
    }
    found
}

/// Files below [`ROOTS`] with an await, in this workspace's words.
fn with_awaits(root: &Path, folder: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(root.join(folder)).expect(folder) {
        let entry = entry.expect("entry");
        let name = format!("{folder}/{}", entry.file_name().to_str().expect("text"));
        if entry.path().is_dir() {
            with_awaits(root, &name, found);
        } else if awaits(&without_tests(&fs::read_to_string(entry.path()).expect("source"))).next().is_some() {
            found.insert(name);
        }
    }
}

#[test]
fn every_file_with_an_await_is_looked_at_or_says_why_not() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("workspace");
    let mut found = BTreeSet::new();
    for folder in ROOTS {
        with_awaits(root, folder, &mut found);
    }
    let covers = |name: &str, file: &str| name == file || (name.ends_with('/') && file.starts_with(name));
    let names: Vec<&str> = FILES.iter().copied().chain(WITHOUT.iter().map(|(name, _)| *name)).collect();
    for file in &found {
        let by: Vec<_> = names.iter().filter(|name| covers(name, file)).collect();
        assert_eq!(by.len(), 1, "{file} has awaits and is in FILES or, with a reason, in WITHOUT: {by:?}");
    }
    let idle: Vec<_> = names.iter().filter(|name| !found.iter().any(|file| covers(name, file))).collect();
    assert!(idle.is_empty(), "without an await: {idle:?}");
    for file in
        found.iter().filter(|file| WITHOUT.iter().any(|(name, why)| name == file && why.starts_with("reads only")))
    {
        let raw = fs::read_to_string(root.join(file)).expect(file);
        let writes = ["insert into ", "update ", "delete from ", " for share", " for key share"];
        let code = &raw[..without_tests(&raw).len()];
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        let found: Vec<_> = lines.filter(|line| writes.iter().any(|word| line.contains(word))).collect();
        assert!(found.is_empty(), "{file} writes or locks: {found:?}");
    }
}

#[test]
fn between_any_two_awaits_that_change_something_stands_a_crash_point() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("workspace");
    let (mut calls, mut entries, mut lacking) = (BTreeSet::<&&str>::new(), BTreeSet::new(), Vec::new());
    for file in FILES {
        let raw = fs::read_to_string(root.join(file)).expect(file);
        let known = |call: &&&str| raw.contains(**call);
        calls.extend(STILL.iter().flat_map(|(_, calls)| calls.iter()).filter(known));
        let still =
            |expression: &str| STILL.iter().any(|(_, calls)| calls.iter().any(|call| expression.contains(call)));
        let all = bare(&raw, still, |name| LEFT_OUT.iter().any(|(f, function, _)| *f == file && *function == name));
        for Bare { function, line, expression } in all {
            let allowed =
                ALLOWED.iter().find(|(f, name, text, _)| *f == file && *name == function && expression.contains(text));
            match allowed {
                Some(entry) => drop(entries.insert(entry)),
                None => lacking.push(format!("{file}:{line} `{function}`: no crash point before `{expression}`")),
            }
        }
        for (_, function, _) in LEFT_OUT.iter().filter(|(f, ..)| *f == file) {
            assert!(raw.contains(&format!("fn {function}")), "{file} has no `{function}` to leave out");
        }
    }
    assert!(lacking.is_empty(), "{}", lacking.join("\n"));
    let idle: Vec<_> = ALLOWED.iter().filter(|entry| !entries.contains(entry)).collect();
    assert!(idle.is_empty(), "allowed, and nothing needs it: {idle:?}");
    let unknown: Vec<_> =
        STILL.iter().flat_map(|(_, calls)| calls.iter()).filter(|call| !calls.contains(call)).collect();
    assert!(unknown.is_empty(), "nobody calls {unknown:?}");
}

#[test]
fn an_await_without_a_point_is_found() {
    let found = |body: &str| {
        let text = format!("async fn f(conn: &mut C) -> Result<()> {{\n{body}\n}}\n#[cfg(test)]\nmod tests {{}}\n");
        bare(&text, |call| call.contains("load("), |_| false).into_iter().map(|b| b.expression).collect::<Vec<_>>()
    };
    let none: [&str; 0] = [];
    assert_eq!(found("one(conn).await?;\ntwo(conn).await"), ["two(conn)"]);
    assert_eq!(
        found("one(conn).await?;\n// crash_points are good\ntwo(conn).await"),
        ["// crash_points are good two(conn)"]
    );
    assert_eq!(found("one(conn).await?;\ncrash_point(\"a.b\");\ntwo(conn).await"), none);
    assert_eq!(
        found("crash_point(\"a.b\");\none(conn).await?;\ntwo(conn).await?;\ncrash_point(\"a.c\");"),
        ["two(conn)"]
    );
    assert_eq!(found("load(conn).await?;\ntwo(conn).await"), none, "what only reads");
    assert_eq!(found("one(conn).await?;\nload(conn).await?;\ntwo(conn).await"), ["two(conn)"], "a read hides no gap");
    let statement = |sql: &str| format!("one(conn).await?;\nquery(\"{sql}\").execute(conn).await?;\ntwo(conn).await");
    assert_eq!(found(&statement("select 1")), ["two(conn)"]);
    assert_eq!(found(&statement("delete from runs")).len(), 2);
    assert_eq!(found(&statement("select 1 from runs for update")).len(), 2, "it locks");
    assert_eq!(found("outer(inner(conn).await?).await"), none, "one is the other's argument");
    assert_eq!(found("match which { 1 => one(conn).await?, _ => two(conn).await? }"), none, "two arms");
    assert_eq!(found("if a { one(conn).await? } else { two(conn).await? }"), none, "two ways");
    assert_eq!(
        found("match one(conn).await? { 1 => two(conn).await?, _ => {} }"),
        ["two(conn)"],
        "one after the other"
    );
    assert_eq!(found("if a { one(conn).await?; return Ok(()); }\ntwo(conn).await"), none, "it has left");
    assert_eq!(found("if a { one(conn).await?; }\ntwo(conn).await"), ["two(conn)"]);
    let or_left = "let Some((a, b)) = one(conn).await? else { return Ok(()) };\n";
    assert_eq!(found(&format!("{or_left}two(conn).await")), ["two(conn)"], "it has not left");
    assert_eq!(found("one(conn).await?;\nself.awaits(two(conn))"), none, "a name that begins like it");
    assert_eq!(
        found("let one = async { deep(conn).await };\ncrash_point(\"a.b\");\nlet s = \".await {\"; one.await"),
        none
    );
    let closure = "|conn| Box::pin(async move {\none(conn).await?;\nOk(1)\n})\n})\n.await";
    assert_eq!(found(&format!("in_transaction(pool, |x| {{ {closure}")).len(), 0, "the commit has its point");
    assert_eq!(found(&format!("other(pool, |x| {{ {closure}")).len(), 1);
}
