-- What work was expected to cost before it was done, and how much of it was approved.
--
-- Forward only. The release before works on this schema: it writes and reads none of it.

-- One row per part of the work and step that forecast it. The newest of a run and part counts; `forecast_errors` sets it beside
-- what was paid.
create table forecasts (
  shard smallint not null, run_id uuid not null,
  path text not null,
  part text not null,                          -- id of an item, or the name of the activity
  activity text not null,                      -- that does it
  project_id uuid not null references projects,
  low_ucr bigint not null check (low_ucr >= 0),
  high_ucr bigint not null,
  limits_ucr bigint not null check (limits_ucr > 0),  -- if every call that is expected uses all of its limits
  stated_at timestamptz not null default engine_now(),
  primary key (shard, run_id, path, part),
  constraint forecasts_interval_check check (low_ucr <= high_ucr)
);
create index forecasts_activity on forecasts (activity, stated_at desc);
create index forecasts_run on forecasts (run_id);
create index forecasts_project on forecasts (project_id);

create view forecast_errors as
select f.run_id, f.part, f.activity, f.project_id, f.low_ucr, f.high_ucr, f.limits_ucr, f.stated_at, paid.spent_ucr,
       r.closed_at is not null as over
from (select distinct on (shard, run_id, part) * from forecasts order by shard, run_id, part, stated_at desc, path desc) f
join runs r on r.shard = f.shard and r.run_id = f.run_id
cross join lateral (
  select coalesce(sum(-t.amount_ucr), 0)::bigint as spent_ucr
  from activity_attempts a join credit_transactions t on t.attempt_id = a.id and t.kind = 'capture'
  where a.run_id = f.run_id and a.activity = f.activity and a.started_at >= f.stated_at
    and (f.part = f.activity or exists (select from unnest(string_to_array(a.path, '/')) s(name) where right(s.name, length(f.part) + 2) = '[' || f.part || ']'))
) paid;

-- What a run may spend: captured and held credits of it and of all runs below it stay within `cap_ucr`. The newest row is in
-- force. A fork without a row of its own may spend what was last allowed to its origin.
create table spending_limits (
  id bigint generated always as identity primary key,
  run_id uuid not null,
  key text not null,                           -- of the step or the request that set it: once
  allowed_ucr bigint not null check (allowed_ucr >= 0),  -- from then on
  cap_ucr bigint not null check (cap_ucr >= allowed_ucr),
  set_by text not null,
  created_at timestamptz not null default engine_now(),
  constraint spending_limits_key unique (run_id, key)
);
create trigger spending_limits_append_only before update or delete on spending_limits for each row execute function append_only();
