//! Checks that are one query each. They share no code with the engine.

/// Name, what a row means, and a query that yields what is at fault as text.
pub(super) const CHECKS: &[(&str, &str, &str)] = &[
    (
        "open_run",
        "an open run neither waits for a signal nor may anybody claim it",
        "select r.run_id || ' ' || r.status || ', waiting ' || coalesce(r.waiting, 'for nothing') from runs r where r.closed_at is null
           and not (r.status = 'running' and r.parked and r.owner is null and r.waiting = 'signal' and r.inbox_n = r.inbox_seen
                    and exists (select from ready q where q.run_id = r.run_id))",
    ),
    (
        "closed_run",
        "a closed run has an owner, a place in the queue or a business key",
        "select r.run_id::text from runs r where r.closed_at is not null and (r.owner is not null
            or exists (select from ready q where q.run_id = r.run_id) or exists (select from workflow_ids w where w.run_id = r.run_id))",
    ),
    (
        "failed_run",
        "a run failed although each of its steps may be tried again",
        "select run_id || ' ' || coalesce(failure::text, '') from runs where status = 'failed'",
    ),
    (
        "history_gap",
        "a history is not numbered from its beginning to the run's seq",
        "select r.run_id::text from runs r
           left join (select run_id, count(*) n, min(seq) low, max(seq) high from history group by 1) h on h.run_id = r.run_id
         where coalesce(h.n, 0) <> r.seq - coalesce(r.forked_seq, 0) or coalesce(h.high, r.seq) <> r.seq
            or coalesce(h.low, 1) <> coalesce(r.forked_seq, 0) + 1",
    ),
    (
        "history_epoch",
        "an epoch fell within a history",
        "select distinct run_id::text from (select run_id, epoch, lag(epoch) over (partition by run_id order by seq) before from history) h
         where epoch < before",
    ),
    (
        "history_end",
        "a closed run's history does not end with the one event that closes it, or an open one's has it",
        "select r.run_id::text from runs r
           left join (select h.run_id, count(*) n, max(h.seq) seq from history h, jsonb_array_elements(h.events) e
                      where e->>'type' = 'run_closed' group by 1) c on c.run_id = r.run_id
         where coalesce(c.n, 0) <> (r.closed_at is not null)::int or c.seq <> r.seq",
    ),
    (
        "attempt",
        "an attempt was not started once and ended once",
        "select coalesce(e->>'attempt_id', '?') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('attempt_started', 'attempt_ended') group by 1
         having count(*) filter (where e->>'type' = 'attempt_started') <> 1 or count(*) filter (where e->>'type' = 'attempt_ended') <> 1",
    ),
    (
        "step",
        "a step of a run began or ended twice",
        "select h.run_id || ' ' || (e->>'path') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('step_started', 'step_ended') group by h.run_id, e->>'path', e->>'type' having count(*) > 1",
    ),
    (
        "signal",
        "a message was received or consumed twice",
        "select h.run_id || ' ' || (e->>'n') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('signal_received', 'signal_consumed') group by h.run_id, e->>'n', e->>'type' having count(*) > 1",
    ),
    (
        "update",
        "an update was answered twice",
        "select h.run_id || ' ' || (e->>'id') from history h, jsonb_array_elements(h.events) e
         where e->>'type' in ('update_completed', 'update_rejected') group by h.run_id, e->>'id' having count(*) > 1",
    ),
    (
        "group",
        "more runs of a concurrency group were under way than its limit of 2",
        "with parts as (select r.run_id, r.inputs->>'stumble' as name, h.at as began, r.closed_at from runs r
                          join history h on h.run_id = r.run_id cross join jsonb_array_elements(h.events) e
                        where r.workflow = 'chaos-part' and e->>'type' = 'run_started')
         select p.run_id || ' part-' || p.name from parts p
         where (select count(*) from parts o where o.name = p.name and o.began <= p.began
                  and coalesce(o.closed_at, 'infinity') > p.began) > 2",
    ),
    (
        "child",
        "a step has several children, or none of the outcome that it recorded",
        "select parent_run_id || ' ' || parent_path from runs where parent_run_id is not null and first_run_id is null group by parent_run_id, parent_path having count(*) > 1
         union all
         select h.run_id || ' ' || (e->>'path') from history h cross join jsonb_array_elements(h.events) e
           join runs c on c.parent_run_id = h.run_id and c.parent_path = e->>'path' and c.continued_as is null
         where e->>'type' = 'step_ended' and e->>'status' = 'succeeded' and (c.status <> 'completed' or c.output is distinct from e->'output')",
    ),
    (
        "chain",
        "a run that continued as new has not one run in its place, or two runs of a chain are open",
        "select r.run_id::text from runs r where (r.status = 'continued') <> (r.continued_as is not null)
            or r.continued_as is not null and (select count(*) from runs n where n.continued_from = r.run_id and n.run_id = r.continued_as) <> 1
         union all
         select coalesce(first_run_id, run_id)::text from runs where closed_at is null group by 1 having count(*) > 1",
    ),
    (
        "dead_worker",
        "a dead worker's runs were not taken over",
        "select id::text from dead_workers where not runs_taken",
    ),
    (
        "settled",
        "an attempt that is paid for is unknown to the ledger, still open there, or only known there",
        "select coalesce(a.id::text, h.id) from
           (select e->>'attempt_id' id from history, jsonb_array_elements(events) e where e->>'type' = 'attempt_started' and e->>'activity' = 'paid@1') h
           full join activity_attempts a on a.id::text = h.id
         where h.id is null or a.id is null or a.state = 'running'",
    ),
    (
        "charged",
        "a saved answer was not charged exactly once",
        "select c.run_id || ' ' || c.path from checkpoints c where c.key = 'answer' and
           (select count(*) from activity_attempts a join api_key_usage k on k.attempt_id = a.id
            where a.run_id = c.run_id and a.path = c.path and k.state = 'succeeded' and k.cost_pusd > 0) <> 1",
    ),
];
