-- What `deploy/citus.sql` calls, for a server without Citus: each call is a row, and refused is what the documentation of Citus 12
-- says that it refuses.

create schema stub;

create table stub.calls (
  n bigint generated always as identity primary key,
  made text not null,
  what regclass,
  by text,
  beside text
);

create function stub.note(made text, what regclass, by text, beside text) returns void language plpgsql as $$
begin
  if exists (select from stub.calls c where c.what = note.what) then
    raise exception '% is named twice', what;
  end if;
  if exists (select from pg_trigger where tgrelid = what and not tgisinternal) then
    raise exception '% has a trigger', what;
  end if;
  insert into stub.calls (made, what, by, beside) values (note.made, note.what, note.by, note.beside);
end $$;

create function create_distributed_table(
  table_name regclass, distribution_column text, distribution_type text default 'hash', colocate_with text default 'default',
  shard_count int default null
) returns void language plpgsql as $$
declare
  found text;
  refers record;
begin
  perform stub.note('create_distributed_table', table_name, distribution_column, colocate_with);
  if colocate_with <> 'default' and not exists (
    select from stub.calls where made = 'create_distributed_table' and what = colocate_with::regclass and what <> table_name)
  then
    raise exception '% is to lie beside %, which is not distributed', table_name, colocate_with;
  end if;
  -- Tables lie beside each other if their columns are of one type.
  if not exists (select from pg_attribute where attrelid = table_name and attname = distribution_column and attnotnull
                   and atttypid = 'smallint'::regtype) then
    raise exception '% has no column % that is a smallint and never null', table_name, distribution_column;
  end if;
  select string_agg(i.indexrelid::regclass::text, ', ') into found from pg_index i
  where i.indrelid = table_name and i.indisunique and not exists (
    select from pg_attribute a where a.attrelid = i.indrelid and a.attname = distribution_column and a.attnum = any(i.indkey::int2[]));
  if found is not null then
    raise exception '% is unique without the distribution column %', found, distribution_column;
  end if;
  -- A sequence whose numbers nodes share out must have room for it.
  if exists (select from pg_attribute where attrelid = table_name and attidentity <> '' and atttypid <> 'bigint'::regtype) then
    raise exception '% has an identity that is no bigint', table_name;
  end if;
  for refers in
    select c.conname, c.confrelid::regclass as target, t.made, t.by,
           case when colocate_with = 'default' then table_name else colocate_with::regclass end as place,
           case when t.beside is null or t.beside = 'default' then c.confrelid::regclass else t.beside::regclass end as target_place,
           exists (select from unnest(c.conkey, c.confkey) k(here, there)
                   join pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.here and a.attname = distribution_column
                   join pg_attribute b on b.attrelid = c.confrelid and b.attnum = k.there and b.attname = t.by) as by_column
    from pg_constraint c left join stub.calls t on t.what = c.confrelid
    where c.conrelid = table_name and c.contype = 'f'
  loop
    if refers.made = 'create_distributed_table' then
      if not refers.by_column then
        raise exception '% of % does not name the distribution column', refers.conname, table_name;
      end if;
      if refers.place <> refers.target_place then
        raise exception '% refers to %, and is not beside it', table_name, refers.target;
      end if;
    elsif refers.made is distinct from 'create_reference_table' then
      raise exception '% refers to %, which is neither distributed nor everywhere', table_name, refers.target;
    end if;
  end loop;
end $$;

create function create_reference_table(table_name regclass) returns void language plpgsql as $$
declare
  found text;
begin
  perform stub.note('create_reference_table', table_name, null, null);
  select string_agg(c.confrelid::regclass::text, ', ') into found from pg_constraint c
  where c.conrelid = table_name and c.contype = 'f' and not exists (
    select from stub.calls t where t.what = c.confrelid and t.made = 'create_reference_table');
  if found is not null then
    raise exception '% refers to %, which is not everywhere', table_name, found;
  end if;
end $$;

create function citus_add_local_table_to_metadata(table_name regclass, cascade_via_foreign_keys boolean default false) returns void
language plpgsql as $$
begin
  perform stub.note('citus_add_local_table_to_metadata', table_name, null, null);
end $$;

create function create_distributed_function(
  function_name regprocedure, distribution_arg_name text default null, colocate_with text default 'default'
) returns void language plpgsql as $$
begin
  insert into stub.calls (made) values ('create_distributed_function');
end $$;
