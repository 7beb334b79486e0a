-- Whose run is whose, beside the ledger: what a run's budget, an item's share and an approved sum are compared with is summed over a chain
-- of runs and all that is below them. `runs` may be spread over nodes; the ledger's tables are not, and a walk over this one goes nowhere.
--
-- Forward only. The release before works on this schema: what it starts is noted by a trigger. Drop that, and the column that it asks,
-- when no worker of it is left.
--
-- What an operator has to expect: one transaction. Whoever locks a user row waits at that door (no attempt starts, ends or calls a model;
-- reads go on) while the runs are copied that have a parent or go on in another's place, some seconds per million rows of `runs`. Gives up
-- after five seconds of waiting for a lock; nothing was changed then, run it again.
set local lock_timeout = '5s';

-- A run that has a parent or goes on in another's place, and may have attempts of its own or below it: written with the first attempt
-- there, never changed, and not taken away when the run leaves into an archive. A run that is alone has no row.
create table run_kin (
  run_id uuid primary key,
  first_run_id uuid,                           -- of its chain; null: the run is the first, or in none
  parent_run_id uuid, parent_path text,
  constraint run_kin_some_check check (first_run_id is not null or parent_run_id is not null)
);

-- Everything that writes the ledger locks a user row first, so nobody starts an attempt between the copy and the trigger.
lock table users in exclusive mode;
insert into run_kin (run_id, first_run_id, parent_run_id, parent_path)
  select run_id, first_run_id, parent_run_id, parent_path from runs where first_run_id is not null or parent_run_id is not null;
create index run_kin_chain on run_kin (first_run_id) where first_run_id is not null;
create index run_kin_parent on run_kin (parent_run_id) where parent_run_id is not null;

-- True: whoever inserted the row has seen to its run's kin.
alter table activity_attempts add column kin_noted boolean not null default false;

-- By its owner's rights: the application may not have any in this table yet.
create function note_kin() returns trigger language plpgsql security definer set search_path = public as $$
begin
  insert into run_kin (run_id, first_run_id, parent_run_id, parent_path)
    with recursive line as (
      select r.run_id, r.first_run_id, r.parent_shard, r.parent_run_id, r.parent_path
      from runs r where r.shard = get_byte(uuid_send(new.run_id), 15) % 128 and r.run_id = new.run_id union all
      select r.run_id, r.first_run_id, r.parent_shard, r.parent_run_id, r.parent_path
      from line join runs r on r.shard = line.parent_shard and r.run_id = line.parent_run_id)
    select run_id, first_run_id, parent_run_id, parent_path from line where first_run_id is not null or parent_run_id is not null
    on conflict do nothing;
  return null;
end $$;
create trigger activity_attempts_kin after insert on activity_attempts for each row when (not new.kin_noted) execute function note_kin();
