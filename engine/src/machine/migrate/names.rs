//! Which step of the new definition a step of the old one is: the one of its id, or the one that the map names.
//!
//! A *shape* is a path without its items and rounds: `each/code` is `each[a-1]/code` and every other item's.

use super::{Migration, Rule};
use crate::definition::{Definition, Kind, Step};
use std::collections::{BTreeMap, BTreeSet};

pub(super) struct Names<'a> {
    /// New ids, by shape; only those that change.
    map: BTreeMap<String, String>,
    /// Steps of the old definition by the id of their image.
    old: BTreeMap<String, &'a Step>,
    ids: BTreeSet<&'a str>,
}

impl<'a> Names<'a> {
    pub(super) fn new(
        old: &'a Definition,
        new: &Definition,
        asked: &BTreeMap<String, String>,
        found: &mut Migration,
    ) -> Self {
        let mut shapes = Vec::new();
        collect(&old.steps, "", &mut shapes);
        collect(&old.finally, crate::machine::state::FINALLY_PREFIX, &mut shapes);
        let mut there = BTreeSet::new();
        new.walk(&mut |step| {
            there.insert(step.id.as_str());
        });
        let mut map = BTreeMap::new();
        for (from, to) in asked {
            let named: Vec<&(String, &Step)> =
                shapes.iter().filter(|(shape, s)| shape == from || s.id == *from).collect();
            if named.is_empty() {
                let text = format!("the map names `{from}`, which is no step of the run's definition: correct it");
                found.violation("", Rule::MapInvalid, text);
            }
            if !there.contains(to.as_str()) {
                let text = format!("the map names `{to}`, which is no step of the new definition: correct it");
                found.violation("", Rule::MapInvalid, text);
            }
            map.extend(named.iter().filter(|(_, s)| s.id != *to).map(|(shape, _)| (shape.clone(), to.clone())));
        }
        redos(&shapes, &there, &mut map);
        let mut names = Self { map, old: BTreeMap::new(), ids: BTreeSet::new() };
        for (shape, step) in shapes {
            let image = names.map.get(&shape).cloned().unwrap_or_else(|| step.id.clone());
            names.old.entry(image).or_insert(step);
            names.ids.insert(&step.id);
        }
        names
    }

    pub(super) fn map(&self) -> &BTreeMap<String, String> {
        &self.map
    }

    /// The id of the image of the step `id` in the block of shape `block` (with its trailing slash).
    pub(super) fn image<'b>(&'b self, block: &str, id: &'b str) -> &'b str {
        self.map.get(&format!("{block}{id}")).map_or(id, String::as_str)
    }

    /// The step of the old definition whose image has this id.
    pub(super) fn origin(&self, image: &str) -> Option<&'a Step> {
        self.old.get(image).copied()
    }

    /// Whether the old definition had a step of this id.
    pub(super) fn was(&self, id: &str) -> bool {
        self.ids.contains(id)
    }
}

/// A `redo` is named after its first and its last step; it follows when they are renamed.
fn redos(shapes: &[(String, &Step)], there: &BTreeSet<&str>, map: &mut BTreeMap<String, String>) {
    for (shape, step) in shapes {
        let (Kind::Repeat { transparent: true, .. }, Some((first, last))) = (&step.kind, step.id.split_once(".."))
        else {
            continue;
        };
        let image = |id: &str| map.get(&format!("{shape}/{id}")).cloned().unwrap_or_else(|| id.to_owned());
        let name = format!("{}..{}", image(first), image(last));
        if name != step.id && !map.contains_key(shape) && there.contains(name.as_str()) {
            map.insert(shape.clone(), name);
        }
    }
}

/// Shapes of all steps. The steps of a `redo` stand beside it, too, once it has ended.
fn collect<'a>(steps: &'a [Step], block: &str, shapes: &mut Vec<(String, &'a Step)>) {
    for step in steps {
        let shape = format!("{block}{}", step.id);
        shapes.push((shape.clone(), step));
        match &step.kind {
            Kind::Repeat { steps, transparent: true, .. } => {
                collect(steps, &format!("{shape}/"), shapes);
                collect(steps, block, shapes);
            }
            Kind::Group { steps, .. } | Kind::Foreach { steps, .. } | Kind::Repeat { steps, .. } => {
                collect(steps, &format!("{shape}/"), shapes);
            }
            Kind::Parallel { branches, .. } => {
                branches.iter().for_each(|b| collect(&b.steps, &format!("{shape}:{}/", b.name), shapes));
            }
            Kind::Switch { cases } => cases.iter().for_each(|c| collect(&c.steps, &format!("{shape}/"), shapes)),
            Kind::Activity { .. }
            | Kind::Set { .. }
            | Kind::Wait { .. }
            | Kind::Await(_)
            | Kind::Call { .. }
            | Kind::Fail { .. }
            | Kind::Finish { .. }
            | Kind::ContinueAsNew { .. } => {}
        }
        step.catch.iter().for_each(|c| collect(&c.steps, &format!("{shape}!/"), shapes));
    }
}

/// The step of this id that is seen in a block: one of its own, or one of a `redo` in it.
pub(super) fn visible<'a>(steps: &'a [Step], id: &str) -> Option<&'a Step> {
    steps.iter().find_map(|step| match &step.kind {
        _ if step.id == id => Some(step),
        Kind::Repeat { steps, transparent: true, .. } => visible(steps, id),
        _ => None,
    })
}
