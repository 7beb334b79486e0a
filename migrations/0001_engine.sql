-- The engine: definitions, runs, histories, queues, workers.
--
-- A run is one execution of a definition. `runs` holds who owns it (`owner`, `epoch`) and how far it is (`seq`);
-- `history` holds one row per transition with the events of that transition, gap-free from seq 1; `cursor` is the
-- folded state at `cursor_seq`, written when the run parks or closes and every few dozen transitions, so that
-- loading a run is the cursor plus a short tail of history. `ready` lists runs that somebody may claim. `inbox` holds what was sent
-- to a run and not yet read. Times come from engine_now(), which tests replace.
-- `shard` (from the run id) leads every key: on Citus it is the distribution column.

create function engine_now() returns timestamptz language sql stable as $$ select clock_timestamp() $$;

create table definitions (
  hash bytea primary key check (octet_length(hash) = 32),
  name text not null,
  version int not null check (version > 0),
  format int not null,
  source text not null,                 -- the text that was deployed, comments and all
  bundle jsonb not null,                -- {relative path: text}
  ir jsonb not null,
  author text, message text,
  created_at timestamptz not null default engine_now(),
  unique (name, version)
);

create table definition_pointers (
  name text not null, pointer text not null, hash bytea not null references definitions,
  moved_at timestamptz not null default engine_now(),
  primary key (name, pointer)
);

-- One row per start of a worker process. The heartbeat is its lease on everything it owns.
create table workers (
  id uuid primary key,
  host text not null, pid int not null, version text not null, queues text[] not null,
  started_at timestamptz not null default engine_now(),
  heartbeat_at timestamptz not null default engine_now(),
  lease_ms int not null check (lease_ms > 0)
) with (fillfactor = 50);

-- Workers whose lease ended. Ids are never reused, so a zombie cannot come back under its old name.
create table dead_workers (
  id uuid primary key,
  died_at timestamptz not null default engine_now(),
  runs_taken boolean not null default false
);

create table runs (
  shard smallint not null,
  run_id uuid not null,
  workflow text not null,
  definition bytea not null references definitions,
  workflow_id text,                     -- business key, unique among open runs through workflow_ids
  status text not null check (status in ('pending','running','paused','cancelling','completed','failed','cancelled','terminated','quarantined')),
  parked boolean not null default false,
  owner uuid,
  epoch bigint not null default 0,
  seq bigint not null default 0,
  inbox_n bigint not null default 0,    -- messages ever sent
  inbox_seen bigint not null default 0, -- messages read by the run
  queue text not null default 'default',
  attributes jsonb not null default '{}',
  topic text,                           -- outbox topic that hears of every transition
  parent_shard smallint, parent_run_id uuid, parent_path text,
  depth int not null default 0 check (depth >= 0), -- runs above it
  inputs jsonb not null,
  cursor jsonb, cursor_seq bigint not null default 0,
  waiting text,                         -- why it is parked, for lists: 'signal', 'timer', 'credits', …
  output jsonb, failure jsonb,
  started_at timestamptz not null default engine_now(),
  closed_at timestamptz,
  primary key (shard, run_id),
  constraint runs_closed_check check ((closed_at is not null) = (status in ('completed','failed','cancelled','terminated'))),
  constraint runs_owner_check check (owner is null or (not parked and closed_at is null)),
  constraint runs_inbox_check check (inbox_seen <= inbox_n)
) with (fillfactor = 70);
create index runs_owner on runs (owner) where owner is not null;
create index runs_attributes on runs using gin (attributes jsonb_path_ops);
create index runs_parent on runs (parent_run_id) where parent_run_id is not null;

create table workflow_ids (
  workflow_id text primary key,
  shard smallint not null, run_id uuid not null
);

create table ready (
  shard smallint not null, run_id uuid not null,
  queue text not null,
  priority smallint not null default 0,
  due_at timestamptz not null default engine_now(),
  primary key (shard, run_id)
) with (fillfactor = 70);
create index ready_due on ready (queue, due_at);

-- One row per transition. Partitioned by the time inside the run id, so that retention is detach and drop.
create table history (
  shard smallint not null, run_id uuid not null,
  seq bigint not null check (seq > 0),
  epoch bigint not null,
  format smallint not null,
  events jsonb not null,
  at timestamptz not null default engine_now(),
  primary key (shard, run_id, seq)
) partition by range (run_id);
create table history_default partition of history default;

create table inbox (
  shard smallint not null, run_id uuid not null,
  n bigint not null check (n > 0),      -- rising per run; a dropped duplicate may leave a gap
  kind text not null check (kind in ('signal','cancel','unblock','child')),
  name text not null default '',
  payload jsonb not null default 'null',
  dedupe_id text,                       -- given by the sender; the second message with the same id is dropped
  sender text,
  sent_at timestamptz not null default engine_now(),
  primary key (shard, run_id, n),
  constraint inbox_dedupe_key unique (shard, run_id, dedupe_id)
);

create table checkpoints (
  shard smallint not null, run_id uuid not null,
  path text not null, key text not null,
  value jsonb not null,
  created_at timestamptz not null default engine_now(),
  primary key (shard, run_id, path, key)
);

-- Newest progress of a running attempt, for people. A lost row costs nothing.
create table attempt_progress (
  shard smallint not null, run_id uuid not null, path text not null,
  attempt int not null,
  progress jsonb not null,
  at timestamptz not null default engine_now(),
  primary key (shard, run_id, path)
);

-- Transitions that an outside consumer must hear of. A consumer takes rows with skip locked, acts, deletes.
create table outbox (
  id bigint generated always as identity primary key,
  topic text not null,
  shard smallint not null, run_id uuid not null, seq bigint not null,
  created_at timestamptz not null default engine_now()
);
create index outbox_topic on outbox (topic, id);
