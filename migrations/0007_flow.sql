-- What moves a run as a whole: pause and resume.

alter table inbox drop constraint inbox_kind_check;
alter table inbox add constraint inbox_kind_check
  check (kind in ('signal','cancel','unblock','child','pause','resume'));

-- A fork's history is its parent's up to `forked_seq` and its own from there on; nothing of the shared part is copied.
alter table runs
  add forked_shard smallint, add forked_from uuid, add forked_seq bigint,
  add constraint runs_forked_check check (
    (forked_from is null) = (forked_seq is null) and (forked_from is null) = (forked_shard is null) and forked_seq > 0);
create index runs_forked on runs (forked_from) where forked_from is not null;

-- A run that came from a file is there to be read. Nobody may own it, so nobody can execute or charge it.
alter table runs
  add imported_at timestamptz,
  add constraint runs_imported_check check (
    imported_at is null or (owner is null and (closed_at is not null or status = 'quarantined')));
