-- Schedules: recurring starts of runs.
--
-- `schedules` holds what to start and when. `next_at` is the next instant of its calendar that nobody has dealt with; `wake_at`
-- is when a worker looks at the row again: for that instant with its jitter, or because something waits. Whoever does locks the
-- row, moves `next_at` on and inserts the runs in one transaction, so that an instant is neither lost nor dealt with twice.
-- `schedule_actions` holds what became of the newest instants and everything that waits; `n` is given under the lock of the
-- schedule's row. Times come from engine_now().

create table schedules (
  id uuid primary key,
  name text not null,
  workflow text not null, pointer text not null,  -- resolved at each start
  inputs jsonb not null,
  attributes jsonb not null,            -- of every run that it starts
  queue text not null,
  topic text,
  workflow_id text,                     -- business key of its runs
  timing jsonb not null,                -- {"cron": {"expression", "timezone"}} or {"every": {"ms", "offset_ms"}}
  overlap text not null check (overlap in ('skip','buffer_one','buffer_all','cancel_other','terminate_other','allow_all')),
  catchup_ms bigint not null check (catchup_ms >= 0),
  jitter_ms bigint not null check (jitter_ms >= 0),
  run_limit int check (run_limit > 0),
  runs_left int check (runs_left >= 0), -- null as long as run_limit is
  next_at timestamptz,                  -- null: no instant will come (paused, at its limit, end of the calendar)
  wake_at timestamptz,                  -- null: nobody needs to look
  paused_at timestamptz,
  note text,                            -- why it is paused, or anything else that people should know
  owner text,                           -- who made it, as `user:<id>`
  action_n bigint not null default 0,
  started bigint not null default 0, skipped bigint not null default 0, missed bigint not null default 0, failed bigint not null default 0,
  created_at timestamptz not null default engine_now(),
  updated_at timestamptz not null default engine_now(),
  constraint schedules_name_key unique (name),
  constraint schedules_limit_check check ((run_limit is null) = (runs_left is null)),
  constraint schedules_paused_check check (paused_at is null or next_at is null)
) with (fillfactor = 70);
create index schedules_wake on schedules (wake_at) where wake_at is not null;

create table schedule_actions (
  schedule_id uuid not null references schedules on delete cascade,
  n bigint not null check (n > 0),
  instant timestamptz not null,         -- of the calendar; of a manual one, when it was asked for
  kind text not null check (kind in ('scheduled','backfill','manual')),
  overlap text check (overlap in ('skip','buffer_one','buffer_all','cancel_other','terminate_other','allow_all')), -- null: the schedule's
  state text not null check (state in ('pending','started','skipped','missed','failed')),
  shard smallint, run_id uuid,
  note text,
  decided_at timestamptz not null default engine_now(),
  primary key (schedule_id, n),
  constraint schedule_actions_run_check check (state <> 'started' or (shard is not null and run_id is not null))
) with (fillfactor = 70);
create index schedule_actions_pending on schedule_actions (schedule_id, n) where state = 'pending';
-- An instant of the calendar is dealt with once; filling in takes over what was skipped.
create unique index schedule_actions_instant on schedule_actions (schedule_id, instant) where kind <> 'manual';
