-- A run that continues as new closes as `continued`, and in the same transaction another run goes on in its place: a chain.
-- `first_run_id` is the first of the chain, by which its parent knows it; it is null in the first itself. Rows of before are
-- in no chain.

alter table runs drop constraint runs_status_check;
alter table runs add constraint runs_status_check
  check (status in ('pending','running','paused','cancelling','completed','failed','cancelled','terminated','continued','quarantined'));
alter table runs drop constraint runs_closed_check;
alter table runs add constraint runs_closed_check
  check ((closed_at is not null) = (status in ('completed','failed','cancelled','terminated','continued')));

alter table runs
  add first_run_id uuid, add continued_from uuid, add continued_as uuid,
  add constraint runs_chain_check check (
    (first_run_id is null) = (continued_from is null) and (continued_as is null or status = 'continued'));

-- A run has one successor, and of a chain one run is open. What came from a file is no part of it here.
create unique index runs_continued_from on runs (continued_from) where continued_from is not null and imported_at is null;
create unique index runs_chain_open on runs (first_run_id)
  where first_run_id is not null and closed_at is null and imported_at is null;
