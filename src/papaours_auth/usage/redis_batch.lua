-- A part of a batch: stored once, or not at all.
-- KEYS: marks, marks by time, events, keys, keys by last use, then the hashes that are counted in.
-- ARGV, in turn: producer, sequence, the part's place in the batch, how many items it has; for how many seconds marks,
-- keys and events are kept, how many events at most, how many fields in a hash; how many columns, and their names; how
-- many events, each its cells; how many counts, each (hash, start, seconds kept, field, calls); how many keys, each
-- (id, machine, first, last, calls). A hash is its place in KEYS.
-- Gives how much of the batch is stored by now, or -1 where a later one is.
local at = 0
local function word()
  at = at + 1
  return ARGV[at]
end
local function number()
  return tonumber(word())
end

local time = redis.call('TIME')
local now = tonumber(time[1])
local producer, sequence, place, items = word(), number(), number(), number()
local mark = redis.call('HGET', KEYS[1], producer)
local done = 0
if mark then
  local last, of_it = string.match(mark, '^(%d+) (%d+)$')
  if tonumber(last) > sequence then return -1 end
  if tonumber(last) == sequence then done = tonumber(of_it) end
end
-- Stored already, or forgotten by a failover: the caller goes on from where we are.
if place ~= done then return done end

local marks_kept, keys_kept, events_kept, most_events, most_fields = number(), number(), number(), number(), number()
local entry = {'XADD', KEYS[3], '*'}
local columns = number()
for column = 1, columns do
  entry[2 + 2 * column] = word()
end
for _ = 1, number() do
  for column = 1, columns do
    entry[3 + 2 * column] = word()
  end
  redis.call(unpack(entry))
end
redis.call('XTRIM', KEYS[3], 'MAXLEN', '~', most_events)
redis.call('XTRIM', KEYS[3], 'MINID', '~', math.max(now - events_kept, 0) * 1000)

for _ = 1, number() do
  local hash, start, kept, field, calls = KEYS[number()], number(), number(), word(), word()
  -- A clock that is wrong makes a hash live neither for ever nor again.
  local left = math.min(start, now) + kept - now
  if left > 0 then
    if redis.call('HEXISTS', hash, field) == 0 and redis.call('HLEN', hash) >= most_fields then field = 'other' end
    redis.call('HINCRBY', hash, field, calls)
    if redis.call('TTL', hash) < 0 then redis.call('EXPIRE', hash, math.ceil(left)) end
  end
end

for _ = 1, number() do
  local id, machine, first, last, calls = word(), word(), number(), number(), number()
  local former = redis.call('HGET', KEYS[4], id)
  if former then
    local began, ended, count = string.match(former, '^(%d+) (%d+) (%d+) ')
    first, last = math.min(first, tonumber(began)), math.max(last, tonumber(ended))
    calls = calls + tonumber(count)
  end
  redis.call('HSET', KEYS[4], id, string.format('%.0f %.0f %.0f %s', first, last, calls, machine))
  redis.call('ZADD', KEYS[5], string.format('%.0f', last), id)
end

-- No lifetimes, which a volatile-… policy would cut short: the old is forgotten here, some of it each time.
local function forget(hash, by_time, before)
  local old = redis.call('ZRANGEBYSCORE', by_time, '-inf', string.format('%.0f', before), 'LIMIT', 0, 100)
  if #old > 0 then
    redis.call('HDEL', hash, unpack(old))
    redis.call('ZREM', by_time, unpack(old))
  end
end
forget(KEYS[1], KEYS[2], now - marks_kept)
forget(KEYS[4], KEYS[5], (now - keys_kept) * 1000000)
redis.call('HSET', KEYS[1], producer, string.format('%.0f %.0f', sequence, place + items))
redis.call('ZADD', KEYS[2], now, producer)
return place + items
