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
