//! Labels of workers, and the keys under which runs that ask for some stand in the queue; and the labels of definitions, by which
//! people find runs.
//!
//! A key is the queue's name with the labels behind it, sorted: `default`, `default[gpu,linux]`. It is in `runs.queue` and
//! `ready.queue`; no queue's own name has a bracket. In SQL the name is `split_part(queue, '[', 1)`.

use serde_json::{Map, Value};

/// Most labels that a definition asks of a worker. As many as a person tells apart.
pub const LABELS_MAX: usize = 8;
/// Most labels of a worker. It says what it has; a definition says what it needs.
pub const WORKER_LABELS_MAX: usize = 32;
/// Longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 63;

/// What stands before the name of a definition's label among the attributes of its runs.
pub const ATTRIBUTE_PREFIX: &str = "label.";
/// Most labels of a definition by which its runs are found. Source: section 3 of the workflow language.
pub const SEARCH_LABELS_MAX: usize = 32;
/// Longest value of such a label, in bytes. Chosen: 32 of them with the longest names are less than the 8 KiB of all attributes.
pub const LABEL_VALUE_BYTES_MAX: usize = 100;

/// Whether a text may be a label: lower-case letters, digits and hyphens, beginning with a letter.
#[must_use]
pub fn is_label(text: &str) -> bool {
    text.len() <= LABEL_BYTES_MAX
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// The attributes of a run, with the labels of its definition (`extras.labels`) among them as `label.NAME`. What they say already
/// stays.
#[must_use]
pub fn labelled(attributes: Value, extras: &Value) -> Value {
    let (Value::Object(mut fields), Some(Value::Object(labels))) = (attributes.clone(), extras.get("labels")) else {
        return attributes;
    };
    for (name, value) in labels {
        fields.entry(format!("{ATTRIBUTE_PREFIX}{name}")).or_insert_with(|| value.clone());
    }
    Value::Object(fields)
}

/// The attributes of a child: its parent's, with the labels of its own definition in the place of the parent's. Those are left out
/// where all would be more than `bytes_max`.
#[must_use]
pub fn handed_down(attributes: &Value, extras: &Value, bytes_max: usize) -> Value {
    let Value::Object(fields) = attributes else { return attributes.clone() };
    let own: Map<String, Value> = fields
        .iter()
        .filter(|(name, _)| !name.starts_with(ATTRIBUTE_PREFIX))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let own = Value::Object(own);
    let all = labelled(own.clone(), extras);
    if all.to_string().len() > bytes_max { own } else { all }
}

/// What is wrong with the name of a queue.
#[must_use]
pub fn queue_violation(name: &str) -> Option<String> {
    name.contains(['[', ']']).then(|| {
        let shown: String = name.chars().take(LABEL_BYTES_MAX).collect();
        format!("`{shown}` cannot be a queue: no brackets; labels stand in the definition's `runs-on`")
    })
}

/// What stands behind the queue's name in the key of a definition's runs.
#[must_use]
pub fn suffix(labels: &[String]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let mut labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    labels.sort_unstable();
    labels.dedup();
    format!("[{}]", labels.join(","))
}

/// The key of the runs that need these labels, from the queue's name or any key of it.
#[must_use]
pub fn key(queue: &str, labels: &[String]) -> String {
    split(queue).0.to_owned() + &suffix(labels)
}

/// The queue's own name, and the labels.
#[must_use]
pub fn split(key: &str) -> (&str, Vec<&str>) {
    match key.split_once('[') {
        Some((queue, labels)) => (queue, labels.trim_end_matches(']').split(',').collect()),
        None => (key, Vec::new()),
    }
}

/// Whether a worker of these queues and labels may claim what stands under a key.
#[must_use]
pub fn serves(queues: &[String], labels: &[String], of: &str) -> bool {
    let (queue, needed) = split(of);
    queues.iter().any(|q| q == queue) && needed.iter().all(|needed| labels.iter().any(|l| l == needed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn texts(all: &[&str]) -> Vec<String> {
        all.iter().map(|l| (*l).to_owned()).collect()
    }

    #[test]
    fn a_key_is_the_queue_with_the_sorted_labels() {
        assert_eq!(key("default", &[]), "default");
        assert_eq!(key("default", &texts(&["linux", "gpu", "linux"])), "default[gpu,linux]");
        // Of another definition: a child, a successor, a migration.
        assert_eq!(key("default[gpu,linux]", &texts(&["arm"])), "default[arm]");
        assert_eq!(key("default[gpu,linux]", &[]), "default");
        assert_eq!(split("default[gpu,linux]"), ("default", vec!["gpu", "linux"]));
        assert_eq!(split("default"), ("default", vec![]));
        assert!(queue_violation("default[gpu]").is_some() && queue_violation("a.b/c:d").is_none());
    }

    #[test]
    fn a_worker_serves_what_needs_no_more_than_it_has() {
        let (queues, labels) = (texts(&["default", "other"]), texts(&["linux", "gpu"]));
        for (key, served) in [
            ("default", true),
            ("default[gpu]", true),
            ("other[gpu,linux]", true),
            ("default[gpu,linux,x64]", false),
            ("third[gpu]", false),
            ("third", false),
        ] {
            assert_eq!(serves(&queues, &labels, key), served, "{key}");
        }
        assert!(!serves(&queues, &[], "default[gpu]"));
    }

    #[test]
    fn labels_are_names() {
        assert!(["gpu", "x64", "my-pool-1"].into_iter().all(is_label));
        assert!(!["", "GPU", "1a", "a,b", "a]", "-a", "a_b", &"a".repeat(64)].into_iter().any(is_label));
    }

    #[test]
    fn labels_of_a_definition_are_attributes_and_a_child_has_its_own() {
        let extras = json!({"labels": {"team": "core", "tier": "gold"}, "on": {}});
        let of = labelled(json!({"user_id": "u", "label.tier": "mine"}), &extras);
        assert_eq!(of, json!({"user_id": "u", "label.team": "core", "label.tier": "mine"}));
        assert_eq!(labelled(json!({"a": 1}), &Value::Null), json!({"a": 1}));
        let child = json!({"labels": {"kind": "small"}});
        assert_eq!(handed_down(&of, &child, 100), json!({"user_id": "u", "label.kind": "small"}));
        assert_eq!(handed_down(&of, &child, 20), json!({"user_id": "u"}), "no room");
        assert_eq!(handed_down(&of, &Value::Null, 100), json!({"user_id": "u"}));
    }
}
