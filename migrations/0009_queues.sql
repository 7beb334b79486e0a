-- Whose turn it is. A run has a priority (1 is first, 5 last) and a fairness key: among runs of one priority every key gets
-- its turn, however many runs another key has. `lane` is a hash of the key, so that the index of the queue stays small and
-- a look at it can begin anywhere. `ready.timed` says that a row came with a due instant ahead of it: the index of turns
-- holds only what waits already, so that a look from lane to lane meets a run in each of them.

alter table runs
  add priority smallint not null default 3 constraint runs_priority_check check (priority between 1 and 5),
  add fairness_key text not null default '',
  add lane int not null default 0;

alter table ready
  alter priority set default 3,
  add lane int not null default 0,
  add timed boolean not null default false;
update ready set priority = 3;
create index ready_turn on ready (queue, priority, lane, due_at) where not timed;

-- Runs that begin when there is a place, or when it is time. A run that is not admitted has no place in `ready` and nobody may
-- claim it. `admissions` holds its terms from its start to its end: `n` is its number of arrival, given under the lock of its
-- group's row; `place` is the number of its place, unique in the group and at most `places`, the limit it came with: never are
-- there more holders than the limit. `place` is null while it waits. The row goes with the transition that closes the run.

alter table runs add admitted boolean not null default true;

create table concurrency_groups (
  name text primary key,
  arrivals bigint not null
) with (fillfactor = 50);

create table admissions (
  shard smallint not null, run_id uuid not null,
  group_name text,                      -- null: it waits for its time only
  n bigint, places int, place int,
  on_conflict text check (on_conflict in ('queue','cancel-running','fail')),
  not_before timestamptz,               -- its rate limit
  primary key (shard, run_id),
  constraint admissions_group_check check (
    (group_name is null) = (n is null) and (group_name is null) = (places is null) and (group_name is null) = (on_conflict is null)
    and (group_name is not null or not_before is not null)),
  constraint admissions_place_check check (place between 1 and places),
  constraint admissions_place_key unique (group_name, place)
) with (fillfactor = 70);
create index admissions_group on admissions (group_name, n);
create index admissions_waiting on admissions (group_name, n) where place is null;

-- The newest starts under a rate, oldest first; planned ones included.
create table rate_limits (
  key text primary key,
  starts timestamptz[] not null default '{}'
) with (fillfactor = 50);
